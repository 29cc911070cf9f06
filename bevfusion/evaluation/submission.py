"""Detections in the LiDAR frame -> nuScenes' submission format in the global frame.

Format: https://www.nuscenes.org/object-detection, section "Results format".
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from nuscenes.eval.common.config import config_factory
from scipy.spatial.transform import Rotation

from bevfusion.data.records import Frame
from bevfusion.errors import InputError

CONFIG = config_factory("detection_cvpr_2019")
MOVING_SPEED = 0.2  # m/s; the limit of BEVFusion's result files
# class -> (attribute when still, attribute when moving): the choice of BEVFusion's result files
ATTRIBUTES = {
    "car": ("vehicle.parked", "vehicle.moving"),
    "truck": ("vehicle.parked", "vehicle.moving"),
    "bus": ("vehicle.stopped", "vehicle.moving"),
    "trailer": ("vehicle.parked", "vehicle.moving"),
    "construction_vehicle": ("vehicle.parked", "vehicle.moving"),
    "pedestrian": ("pedestrian.standing", "pedestrian.moving"),
    "motorcycle": ("cycle.without_rider", "cycle.with_rider"),
    "bicycle": ("cycle.without_rider", "cycle.with_rider"),
    "traffic_cone": ("", ""),
    "barrier": ("", ""),
}


def to_submission(
    results: Sequence[Mapping],
    frames: Sequence[Frame],
    classes: Sequence[str],
    modality: Mapping[str, bool] | None = None,
) -> dict:
    """Convert one result a frame to a nuScenes submission.

    Args:
        results: dicts with boxes_3d (LiDARInstance3DBoxes of 9 columns), scores_3d and labels_3d (M,).
        frames: the frames (token and poses), in the same order.
        classes: class names by label.
        modality: which sensors were used, for the submission's `meta` (default: camera and LiDAR).

    Raises:
        InputError: a class that nuScenes does not evaluate, or detections that are not finite.
    """
    unknown = [name for name in classes if name not in ATTRIBUTES]
    if unknown:
        raise InputError(f"class {unknown[0]!r} is not one of nuScenes' detection classes: {', '.join(ATTRIBUTES)}")
    used = {"use_lidar": True, "use_camera": True, **(modality or {})}
    sensors = ("use_lidar", "use_camera", "use_radar", "use_map", "use_external")
    names = np.array(classes)
    converted = {frame.token: _convert(result, frame, names) for result, frame in zip(results, frames, strict=True)}
    return {"meta": {sensor: bool(used.get(sensor, False)) for sensor in sensors}, "results": converted}


def save_submission(submission: Mapping, path: str | Path) -> None:
    """Write a submission as JSON, all of it or nothing; raises InputError if it can't be written."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(submission))
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"can't write the results file {path}: {error.strerror}") from error


def load_submission(path: str | Path) -> dict:
    """Read a submission file; raises InputError if it is not one."""
    try:
        submission = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"can't read the results file {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"results file {path} is not valid JSON: {error}") from error
    if not isinstance(submission, dict) or not isinstance(submission.get("results"), dict):
        raise InputError(f"{path} is not a nuScenes results file: it has no 'results' by sample token")
    return submission


def _convert(result: Mapping, frame: Frame, classes: np.ndarray) -> list[dict]:
    """Submission entries of one frame, in the order of its detections, out-of-range ones left out."""
    boxes, scores, labels = (
        tensor.detach().cpu().numpy()
        for tensor in (result["boxes_3d"].tensor, result["scores_3d"], result["labels_3d"])
    )
    if not np.isfinite(boxes).all() or not np.isfinite(scores).all():
        raise InputError(f"the model's detections for sample {frame.token} are not finite: it can't be evaluated")
    boxes = boxes.astype(np.float64)
    centres = boxes[:, :3] + boxes[:, 5:6] * (0, 0, 0.5)
    in_ego = centres @ frame.lidar2ego[:3, :3].T + frame.lidar2ego[:3, 3]
    limits = np.array([CONFIG.class_range[name] for name in classes], dtype=np.float64)
    keep = np.flatnonzero(np.hypot(in_ego[:, 0], in_ego[:, 1]) <= limits[labels])
    if len(keep) > CONFIG.max_boxes_per_sample:  # the devkit refuses more: keep the best, in their order
        keep = np.sort(keep[np.argsort(-scores[keep], kind="stable")[: CONFIG.max_boxes_per_sample]])
    boxes, names = boxes[keep], classes[labels[keep]].tolist()
    lidar2global = frame.ego2global @ frame.lidar2ego
    rotation = Rotation.from_matrix(lidar2global[:3, :3])
    velocities = np.pad(boxes[:, 7:9], ((0, 0), (0, 1))) @ lidar2global[:3, :3].T
    moving = np.hypot(velocities[:, 0], velocities[:, 1]) > MOVING_SPEED
    columns = {
        "translation": (centres[keep] @ lidar2global[:3, :3].T + lidar2global[:3, 3]).tolist(),
        "size": boxes[:, [4, 3, 5]].tolist(),
        "rotation": _yawed(rotation, boxes[:, 6]).tolist(),
        "velocity": velocities[:, :2].tolist(),
        "detection_name": names,
        "detection_score": scores[keep].astype(np.float64).tolist(),
        "attribute_name": [ATTRIBUTES[name][int(moves)] for name, moves in zip(names, moving, strict=True)],
    }
    rows = zip(*columns.values(), strict=True)
    return [{"sample_token": frame.token, **dict(zip(columns, row, strict=True))} for row in rows]


def _yawed(rotation: Rotation, yaw: np.ndarray) -> np.ndarray:
    """(M, 4) quaternions (w, x, y, z) of `rotation` after turns by `yaw` (M,) about the z axis."""
    x, y, z, w = rotation.as_quat()
    cos, sin = np.cos(yaw / 2), np.sin(yaw / 2)
    return np.stack([w * cos - z * sin, x * cos + y * sin, y * cos - x * sin, z * cos + w * sin], axis=1)
