"""What forked worker processes have in common."""

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection


def start_worker() -> None:
    """Make a worker deaf to Ctrl-C (its parent hears it), single-threaded, and gone when its parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit_numpy_threads()
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def limit_numpy_threads() -> None:
    """Keep numpy's linear algebra on one thread: several processes with as many threads hinder one another."""
    with contextlib.suppress(ImportError):
        import threadpoolctl

        threadpoolctl.threadpool_limits(1)


def _leave_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
