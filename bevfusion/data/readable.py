"""Whether the files of frames can be opened, found out for many frames at once without decoding them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from bevfusion.data.nuscenes import NuScenesDataset
from bevfusion.data.pipelines.points import LoadPointsFromFile, LoadPointsFromMultiSweeps
from bevfusion.errors import InputError

THREADS = 16  # file systems over a network answer many at once


def unreadable_frames(dataset: NuScenesDataset, indices: Sequence[int]) -> dict[int, InputError]:
    """Index -> what is wrong, for those frames of `indices` of which a file is missing, empty, cut off or no image.

    Every file that the frame's pipeline may read is opened: point clouds are judged by their size, images by their
    header. What lies behind (pixels, NaN in a cloud) shows when the frame is loaded.
    """

    def check(index: int) -> InputError | None:
        try:
            with dataset.naming(index):
                _check_frame(dataset, index)
        except InputError as error:
            return error
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(indices, pool.map(check, indices), strict=True)
        return {index: error for index, error in found if error is not None}


def _check_frame(dataset: NuScenesDataset, index: int) -> None:
    data = dataset.get_data_info(index)
    for transform in dataset.pipeline.transforms:
        if isinstance(transform, LoadPointsFromFile):
            _check_cloud(data["lidar_path"], transform.load_dim)
        elif isinstance(transform, LoadPointsFromMultiSweeps):
            for sweep in data["sweeps"]:
                _check_cloud(sweep["data_path"], transform.load_dim)
    for path in data.get("image_paths", ()):
        _check_image(path)


def _check_cloud(path: str, columns: int) -> None:
    try:
        if path.endswith(".npy"):
            size = np.load(path, allow_pickle=False, mmap_mode="r").size * 4
        else:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"point cloud {path} can't be read: {error}") from error
    if size == 0 or size % (4 * columns):
        what = "is empty" if size == 0 else f"is cut off, or its points have not load_dim={columns} values"
        raise InputError(f"point cloud {path} {what}; copy it again from the data set")


def _check_image(path: str) -> None:
    try:
        with Image.open(path):  # reads the header alone
            pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} can't be opened ({error}); copy it again from the data set") from error
