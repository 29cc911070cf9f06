"""One writer at a time: a lock on a result for the length of a run."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lean.errors import QuantizationError

logger = logging.getLogger(__name__)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep other runs from writing `path` for the length of a `with` block.

    The lock lies on a file beside `path` that is removed at the end. The system drops the lock when the process dies,
    however it dies: what a killed run leaves behind is in nobody's way.

    Raises:
        QuantizationError: another process holds the lock, or the file beside `path` can't be made.
    """
    beside = path.with_name(f".{path.name}.lock")
    try:
        file = _locked(beside)
    except BlockingIOError:
        raise QuantizationError(
            f"another run is writing {path} ({_holder(beside)}): wait for it, or choose another file"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise QuantizationError(f"{path}: can't write there ({error.strerror}); choose another folder") from None
        logger.warning("%s: its file system has no locks: start no second run that writes it", path)
        yield
        return
    with file:
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)  # while it is still locked: nobody else's file can have this name


def _locked(beside: Path) -> TextIO:
    """Open and lock a file, anew where its last holder has removed it in between; raises OSError."""
    while True:
        file = beside.open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, beside):
                file.truncate(0)
                file.write(f"{os.getpid()}")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(beside: Path) -> str:
    """Say which process holds the lock, as far as it has said so."""
    try:
        return f"process {int(beside.read_text(encoding='ascii'))}"
    except (OSError, ValueError):
        return "a process that has just started"
