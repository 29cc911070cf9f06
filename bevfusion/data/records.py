"""One frame of a data set in memory: what every layout of info file is turned into, once, when it is read.

Matrices are float64 and act on column vectors; metres throughout. Boxes follow mmdet3d 1.0 (see `bevfusion.boxes`).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Cameras:
    """The N cameras of a frame, in the order of the info file."""

    names: tuple[str, ...]
    paths: tuple[str, ...]  # as stored; `bevfusion.data.paths.find_file` finds them
    intrinsics: np.ndarray  # (N, 3, 3)
    camera2ego: np.ndarray  # (N, 4, 4)
    camera2lidar: np.ndarray  # (N, 4, 4), ego motion between the two exposures included


@dataclass(frozen=True, slots=True)
class Sweeps:
    """The S LiDAR sweeps before a keyframe, latest first."""

    paths: tuple[str, ...]
    timestamps: np.ndarray  # (S,) microseconds
    sweep2lidar: np.ndarray  # (S, 4, 4), into the keyframe's LiDAR frame: ego motion included


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """The M annotated boxes of a frame."""

    boxes: np.ndarray  # (M, 9) x, y, z of the bottom centre, length, width, height, yaw, vx, vy (NaN if unknown)
    names: np.ndarray  # (M,) class names
    lidar_points: np.ndarray  # (M,) number of LiDAR points in the box
    valid: np.ndarray  # (M,) bool, seen by LiDAR or radar


@dataclass(frozen=True, slots=True)
class Frame:
    """One keyframe."""

    token: str
    scene: str  # scene token, or a name derived from the log and the time
    timestamp: int  # microseconds
    location: str | None  # nuScenes map name
    lidar_path: str
    lidar2ego: np.ndarray  # (4, 4)
    ego2global: np.ndarray  # (4, 4)
    cameras: Cameras
    sweeps: Sweeps
    ground_truth: GroundTruth | None  # None in a test split
