"""Writing several files of a folder: all of them, or none."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lean.errors import QuantizationError


@contextmanager
def all_or_none(folder: Path, staging_name: str | None = None) -> Iterator[Path]:
    """Give a `with` block an empty folder, whose files replace those of `folder` when the block ends well.

    Other files in `folder` stay.

    Args:
        staging_name: what the empty folder is called, if nobody else writes there; what a killed run has left under
            that name is removed.

    Raises:
        QuantizationError: the files can't be written there; those that were there are as they were.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = _make(folder, staging_name)
    except OSError as error:
        raise QuantizationError(f"{folder}: can't write there ({error.strerror}); choose another folder") from None
    try:
        yield staging
        _replace(staging, folder)
    except OSError as error:
        raise QuantizationError(f"{folder} was not written ({error.strerror}); its files are as they were") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _make(folder: Path, name: str | None) -> Path:
    if name is None:
        return Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(mode=0o700)
    return folder / name


def _replace(staging: Path, folder: Path) -> None:
    """Move the files of `staging` into `folder`; if one can't be moved, put everything back.

    At every moment each file is there whole, the old or the new one.
    """
    names = sorted(path.name for path in staging.iterdir())
    old = staging / "old"
    old.mkdir()
    for name in names:
        _sync(staging / name)
        if (folder / name).exists():
            _keep(folder / name, old / name)
    moved = []
    try:
        for name in names:
            os.replace(staging / name, folder / name)
            moved.append(name)
    except OSError:
        for name in moved:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            else:
                (folder / name).unlink()
        raise
    _sync(folder)


def _keep(path: Path, copy: Path) -> None:
    """Give a file a second name; a copy, where the file system has no hard links."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's list of files, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
