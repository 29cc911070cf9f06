"""Writing files whole or not at all."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lean.errors import QuantizationError

REASONS = {errno.ENOSPC: "the disk is full", errno.EFBIG: "the file would exceed the size limit"}


def check_writable(path: Path, what: str) -> None:
    """Make sure, before a long run, that `path` can be written at its end; makes its folder.

    Raises:
        QuantizationError: it is a folder, or its folder can't be made or written to; `what` names the option.
    """
    if path.is_dir():
        raise QuantizationError(f"{what} {path}: is a folder, name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise QuantizationError(f"{what} {path}: can't write there ({error.strerror}); choose another folder") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` when the block ends well, and vanishes when it doesn't.

    Raises:
        QuantizationError: the disk is full, or the folder can't be written to; an older `path` is as it was.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise QuantizationError(f"{path}: can't write there ({error.strerror}); choose another folder") from None
    try:
        with explained(path):
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write in a `with` block into a QuantizationError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own
        if not isinstance(cause, OSError):
            raise
        reason = REASONS.get(cause.errno, cause.strerror)
        raise QuantizationError(f"{path} was not written: {reason}; what was there before is untouched") from error


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
