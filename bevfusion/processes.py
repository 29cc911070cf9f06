"""What forked worker processes have in common."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection


def start_worker() -> None:
    """Make a worker deaf to Ctrl-C (its parent hears it), easy to terminate, and gone when its parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
