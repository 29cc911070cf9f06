"""LiDAR points: loading a keyframe, adding the sweeps before it, thinning the beams."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmdet3d.core.points import LiDARPoints

from bevfusion.errors import InputError
from bevfusion.registry import PIPELINES

TIME = 4  # column of the time lag
BEAMS_KEPT = {16: range(1, 32, 2), 4: (7, 9, 11, 13), 1: (9,)}  # of the 32 beams, counted from above


def load_cloud(path: str, columns: int) -> np.ndarray:
    """(P, columns) float32 points of a raw .bin or an .npy file; a fresh array.

    Raises:
        InputError: the file can't be read, is empty, has another number of columns, or holds NaN or infinity.
    """
    try:
        points = np.load(path, allow_pickle=False) if path.endswith(".npy") else np.fromfile(path, dtype=np.float32)
        cut_off = not path.endswith(".npy") and os.path.getsize(path) != points.nbytes
    except (OSError, ValueError) as error:
        raise InputError(f"point cloud {path} can't be read: {error}") from error
    if points.size == 0:
        raise InputError(f"point cloud {path} is empty; copy it again from the data set")
    if points.size % columns or cut_off:
        raise InputError(
            f"point cloud {path} is cut off, or its points have not load_dim={columns} values; "
            "copy it again from the data set or correct load_dim"
        )
    points = points.reshape(-1, columns).astype(np.float32, copy=False)
    if not np.isfinite(points).all():
        raise InputError(f"point cloud {path} holds NaN or infinite values; copy it again from the data set")
    return points


def reduce_beams(points: np.ndarray, beams: int) -> np.ndarray:
    """The points (P, >=3) of `beams` (16, 4 or 1) of nuScenes' 32 beams, told by their elevation.

    Raises:
        InputError: another number of beams.
    """
    if beams not in BEAMS_KEPT:
        raise InputError(f"reduce_beams={beams} is not one of 32, {', '.join(map(str, BEAMS_KEPT))}")
    x, y, z = points[:, :3].T
    with np.errstate(invalid="ignore"):  # a point at the origin has no elevation and belongs to no beam
        elevation = np.arcsin(z / np.sqrt(x * x + y * y + z * z))
    # float32 and one after the other, as the original: points at a boundary stay on its side
    edges = np.subtract.accumulate(np.array([0.1862] + [0.023275] * 30 + [0], dtype=np.float32))
    edges[31] = -0.5353
    edges -= np.float32(0.012)
    keep = np.zeros(len(points), dtype=bool)
    for beam in BEAMS_KEPT[beams]:
        keep |= (elevation < edges[beam - 1]) & (elevation > edges[beam])
    return points[keep]


class _CloudLoader:
    """What the two loaders share: columns and beams."""

    def __init__(
        self, load_dim: int, use_dim: int | Sequence[int], reduce_beams: int | None, load_augmented: str | None
    ):
        if load_augmented is not None:
            raise InputError(f"load_augmented={load_augmented!r} (virtual points) is not supported; set it to null")
        self.load_dim, self.beams = load_dim, reduce_beams
        self.use_dim = list(range(use_dim)) if isinstance(use_dim, int) else list(use_dim)
        if max(self.use_dim) >= load_dim:
            raise InputError(
                f"{type(self).__name__}: use_dim={self.use_dim} needs more than load_dim={load_dim} columns"
            )

    def _load(self, path: str) -> np.ndarray:
        points = load_cloud(path, self.load_dim)
        return reduce_beams(points, self.beams) if self.beams and self.beams < 32 else points


@PIPELINES.register_module()
class LoadPointsFromFile(_CloudLoader):
    """Load the keyframe's LiDAR points `lidar_path` into `points`.

    Args:
        coord_type: only "LIDAR".
        load_dim: number of float32 columns in the file (x, y, z, intensity, ring).
        use_dim: number or list of the columns kept.
        load_augmented: only None.
        reduce_beams: number of beams to keep, 32 for all.

    Raises:
        InputError: the file is damaged, or an option is not supported.
    """

    def __init__(
        self,
        coord_type: str = "LIDAR",
        load_dim: int = 5,
        use_dim: int | Sequence[int] = 5,
        load_augmented: str | None = None,
        reduce_beams: int | None = None,
    ):
        if coord_type != "LIDAR":
            raise InputError(f"LoadPointsFromFile: coord_type {coord_type!r} is not supported, only 'LIDAR'")
        super().__init__(load_dim, use_dim, reduce_beams, load_augmented)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        points = self._load(data["lidar_path"])[:, self.use_dim]
        data["points"] = LiDARPoints(points, points_dim=points.shape[1])
        return data


@PIPELINES.register_module()
class LoadPointsFromMultiSweeps(_CloudLoader):
    """Append the points of earlier sweeps, moved into the keyframe's LiDAR frame; column 4 becomes the time lag (s).

    Clouds without a fifth column get no time lag.

    Args:
        sweeps_num: how many sweeps. From more, a random choice is taken; the nearest ones in test mode.
        load_dim: number of float32 columns in the file.
        use_dim: number or list of the columns kept at the end.
        pad_empty_sweeps: without any sweep, append the keyframe `sweeps_num` times instead.
        remove_close: drop points of the sweeps with both |x| and |y| below 1 m (the car itself).
        test_mode: never choose at random, even if the data set is not in test mode.
        load_augmented: only None.
        reduce_beams: number of beams to keep, 32 for all.

    Raises:
        InputError: a file is damaged, or an option is not supported.
    """

    def __init__(
        self,
        sweeps_num: int = 10,
        load_dim: int = 5,
        use_dim: int | Sequence[int] = (0, 1, 2, 4),
        pad_empty_sweeps: bool = False,
        remove_close: bool = False,
        test_mode: bool = False,
        load_augmented: str | None = None,
        reduce_beams: int | None = None,
    ):
        super().__init__(load_dim, use_dim, reduce_beams, load_augmented)
        self.sweeps_num, self.pad_empty_sweeps, self.remove_close = sweeps_num, pad_empty_sweeps, remove_close
        self.test_mode = test_mode

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        key = data["points"].tensor.numpy()
        key[:, TIME : TIME + 1] = 0
        sweeps = data["sweeps"]
        if sweeps:
            chosen = self._choose(len(sweeps), self.test_mode or data.get("test_mode", False))
            clouds = [self._sweep(sweeps[i], data["timestamp"])[:, : key.shape[1]] for i in chosen]
        else:
            clouds = [self._far(key)] * self.sweeps_num if self.pad_empty_sweeps else []
        points = np.concatenate([key, *clouds])
        if self.use_dim != list(range(points.shape[1])):
            points = points[:, self.use_dim]
        data["points"] = LiDARPoints(points, points_dim=points.shape[1])
        return data

    def _choose(self, count: int, nearest: bool) -> Sequence[int]:
        if count <= self.sweeps_num or nearest:
            return range(min(count, self.sweeps_num))
        return np.random.choice(count, self.sweeps_num, replace=False)

    def _sweep(self, sweep: dict[str, Any], timestamp: float) -> np.ndarray:
        points = self._far(self._load(sweep["data_path"]))
        points[:, :3] = points[:, :3] @ sweep["sensor2lidar_rotation"].T + sweep["sensor2lidar_translation"]
        points[:, TIME : TIME + 1] = timestamp / 1e6 - sweep["timestamp"] / 1e6
        return points

    def _far(self, points: np.ndarray) -> np.ndarray:
        """A copy without the points near the sensor, if they are to be removed."""
        if not self.remove_close:
            return points.copy()
        return points[(np.abs(points[:, :2]) >= 1).any(axis=1)]
