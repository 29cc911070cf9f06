"""Info files: the tables of frames that nuScenes converters write, read into `bevfusion.data.records`.

Two layouts are known: that of the original BEVFusion and mmdet3d < 1.1 (`infos`, `metadata`), and that of mmdet3d
>= 1.1 (`data_list`, `metainfo`), read by `bevfusion.data.infos_mmdet3d`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bevfusion.boxes import legacy_to_lidar
from bevfusion.data.entry import Entry, column
from bevfusion.data.infos_mmdet3d import read_mmdet3d_frame
from bevfusion.data.pickles import load_pickle
from bevfusion.data.records import Cameras, Frame, GroundTruth, Sweeps
from bevfusion.errors import InputError

VEHICLES = ("car", "truck", "bus")  # always longer than wide
SCENE_GAP = 2_000_000  # microseconds; keyframes of a scene are 0.5 s apart


def load_infos(path: str | Path) -> tuple[list[Frame], dict[str, Any]]:
    """Frames of an info file (.pkl or .json) in the order of time, and the file's metadata (`version` ...).

    Raises:
        InputError: the file is missing or damaged, or has a layout that we don't know; a missing key is named.
    """
    content = _read(Path(path))
    if isinstance(content, dict) and "data_list" in content:
        top = Entry(content, str(path))
        metadata = top.entry("metainfo")
        frames = [read_mmdet3d_frame(entry, metadata) for entry in _named(top.entries("data_list"), path)]
    elif isinstance(content, dict) and "infos" in content:
        top = Entry(content, str(path))
        metadata = top.entry("metadata") if "metadata" in top else Entry({}, str(path))
        entries = _named(top.entries("infos"), path)
        lengths_first = _lengths_first(entries)
        frames = [_read_frame(entry, lengths_first) for entry in entries]
    else:
        raise InputError(f"{path} is not a nuScenes info file: key 'infos' (or 'data_list') is missing")
    if not frames:
        raise InputError(f"{path} lists no frames")
    _check_cameras(frames, path)
    return _name_scenes(sorted(frames, key=lambda frame: frame.timestamp)), dict(metadata.values)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(
            f"info file {path} does not exist; write it with `python -m bevfusion.create_data --root {path.parent} "
            "--version v1.0-trainval` (or v1.0-mini), or correct the data root"
        )
    if path.suffix != ".json":
        return load_pickle(path)
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def _named(entries: list[Entry], path: str | Path) -> list[Entry]:
    """The same entries, called by their tokens."""
    return [Entry(entry.values, f"{path}: frame {entry.text('token')}") for entry in entries]


def _read_frame(info: Entry, lengths_first: bool) -> Frame:
    cameras = info.entry("cams")
    readers = [cameras.entry(name) for name in cameras.values]
    sweeps = info.entries("sweeps")
    return Frame(
        token=info.text("token"),
        scene=info.text("scene_token") if "scene_token" in info else "",
        timestamp=int(info.array("timestamp")),
        location=info.text("location") if "location" in info else None,
        lidar_path=info.text("lidar_path"),
        lidar2ego=_poses([info], "lidar2ego")[0],
        ego2global=_poses([info], "ego2global")[0],
        cameras=Cameras(
            names=tuple(cameras.values),
            paths=tuple(camera.text("data_path") for camera in readers),
            intrinsics=_intrinsics(readers),
            camera2ego=_poses(readers, "sensor2ego"),
            camera2lidar=_sensors2lidar(readers),
        ),
        sweeps=Sweeps(
            paths=tuple(sweep.text("data_path") for sweep in sweeps),
            timestamps=column(sweeps, "timestamp"),
            sweep2lidar=_sensors2lidar(sweeps),
        ),
        ground_truth=_ground_truth(info, lengths_first) if "gt_boxes" in info else None,
    )


def _ground_truth(info: Entry, lengths_first: bool) -> GroundTruth:
    """Boxes of an entry; `gt_boxes` has the gravity centre and, unless `lengths_first`, the legacy convention."""
    boxes = info.array("gt_boxes", -1, 7)
    count = len(boxes)
    if not lengths_first:
        boxes = legacy_to_lidar(boxes)
    boxes[:, 2] -= boxes[:, 5] / 2
    lidar_points = info.array("num_lidar_pts", count)
    radar_points = info.array("num_radar_pts", count) if "num_radar_pts" in info else 0
    valid = info.array("valid_flag", count) if "valid_flag" in info else lidar_points + radar_points
    return GroundTruth(
        boxes=np.hstack([boxes, info.array("gt_velocity", count, 2, finite=False)]),
        names=_names(info, count),
        lidar_points=lidar_points.astype(np.int64),
        valid=valid > 0,
    )


def _names(info: Entry, count: int) -> np.ndarray:
    names = np.asarray(info["gt_names"], dtype=np.str_)
    if names.shape != (count,):
        raise InputError(f"{info.where}: 'gt_names' should have shape ({count},), not {names.shape}")
    return names


def _lengths_first(infos: Sequence[Entry]) -> bool:
    """Whether boxes are (length, width, height, yaw): mmdet3d 1.0 wrote the original's keys with its own convention."""
    excess = []
    for info in infos:
        if "gt_boxes" in info:
            boxes = info.array("gt_boxes", -1, 7)
            boxes = boxes[np.isin(_names(info, len(boxes)), VEHICLES)]
            excess.extend(boxes[:, 3] - boxes[:, 4])
        if len(excess) > 1000:  # far more than the median needs
            break
    return bool(excess) and bool(np.median(excess) > 0)


def _intrinsics(cameras: Sequence[Entry]) -> np.ndarray:
    old = bool(cameras) and "cam_intrinsic" in cameras[0]  # as mmdet3d and BEVFusion's first version call it
    return column(cameras, "cam_intrinsic" if old else "camera_intrinsics", 3, 3)


def _poses(entries: Sequence[Entry], name: str) -> np.ndarray:
    """(N, 4, 4) from the quaternions (w, x, y, z) and translations that N entries store under `name`."""
    quaternions = column(entries, f"{name}_rotation", 4)
    lengths = np.linalg.norm(quaternions, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(f"{entries[int(lengths.argmin())].where}: '{name}_rotation' is the zero quaternion")
    w, x, y, z = (quaternions / lengths).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return _transforms(np.moveaxis(np.array(rows), 2, 0), column(entries, f"{name}_translation", 3))


def _sensors2lidar(entries: Sequence[Entry]) -> np.ndarray:
    rotations = column(entries, "sensor2lidar_rotation", 3, 3)
    return _transforms(rotations, column(entries, "sensor2lidar_translation", 3))


def _transforms(rotations: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """(N, 4, 4) from (N, 3, 3) and (N, 3)."""
    transforms = np.zeros((len(rotations), 4, 4))
    transforms[:, :3, :3], transforms[:, :3, 3], transforms[:, 3, 3] = rotations, translations, 1
    return transforms


def _check_cameras(frames: list[Frame], path: str | Path) -> None:
    """Batches need the same cameras in the same order everywhere."""
    first = frames[0].cameras.names
    for frame in frames:
        if frame.cameras.names != first:
            raise InputError(
                f"{path}: frame {frame.token} has the cameras {', '.join(frame.cameras.names)}, "
                f"frame {frames[0].token} has {', '.join(first)}; every frame needs the same ones in the same order"
            )


def _name_scenes(frames: list[Frame]) -> list[Frame]:
    """Frames (in the order of time) with a scene made up where the file gives none: the log, split at gaps."""
    named, last = [], {}
    for frame in frames:
        if not frame.scene:
            log = Path(frame.lidar_path).name.split("__")[0]
            time, number = last.get(log, (frame.timestamp, 0))
            number += frame.timestamp - time > SCENE_GAP
            last[log] = frame.timestamp, number
            frame = dataclasses.replace(frame, scene=f"{log}#{number}")
        named.append(frame)
    return named
