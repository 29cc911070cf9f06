"""Writing several files of a folder: all of them, or none."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lean.errors import QuantizationError


@contextmanager
def all_or_none(folder: Path) -> Iterator[Path]:
    """Give a `with` block an empty folder, whose files replace those of `folder` when the block ends well.

    Other files in `folder` stay.

    Raises:
        QuantizationError: the files can't be written there; those that were there are as they were.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
    except OSError as error:
        raise QuantizationError(f"{folder}: can't write there ({error.strerror}); choose another folder") from None
    try:
        yield staging
        _replace(staging, folder)
    except OSError as error:
        raise QuantizationError(f"{folder} was not written ({error.strerror}); its files are as they were") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, folder: Path) -> None:
    """Move the files of `staging` into `folder`; if one can't be moved, put everything back."""
    names = sorted(path.name for path in staging.iterdir())
    old = staging / "old"
    old.mkdir()
    moved = []
    try:
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, old / name)
            moved.append(name)
            os.replace(staging / name, folder / name)
    except OSError:
        for name in moved:
            (folder / name).unlink(missing_ok=True)
            if (old / name).exists():
                os.replace(old / name, folder / name)
        raise
