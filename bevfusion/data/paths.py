"""Where the files of a data set are, when an info file was written on another machine or from another folder."""

from collections.abc import Iterator
from pathlib import Path, PurePath

from bevfusion.errors import InputError

NUSCENES_FOLDERS = ("samples", "sweeps")


def find_file(path: str, root: str | Path, channel: str) -> str:
    """Path of an existing file that an info file calls `path`.

    Args:
        path: absolute, relative to the data root, or relative to the working folder.
        root: data root, the folder with samples/ and sweeps/.
        channel: sensor that the file comes from, such as CAM_FRONT: the file may lie in samples/<channel> of the root.

    Raises:
        InputError: there is no such file.
    """
    for candidate in _candidates(PurePath(path), Path(root), channel):
        if candidate.is_file():
            return str(candidate)
    raise InputError(
        f"{channel} file {path} does not exist (data root: {root}); complete the data set or correct the data root"
    )


def _candidates(path: PurePath, root: Path, channel: str) -> Iterator[Path]:
    yield root / path  # an absolute path replaces the root
    starts = [i for i, part in enumerate(path.parts) if part in NUSCENES_FOLDERS]
    if starts:
        yield root.joinpath(*path.parts[starts[-1] :])
    yield Path(path)
    for folder in NUSCENES_FOLDERS:
        yield root / folder / channel / path.name
    yield root / path.name
