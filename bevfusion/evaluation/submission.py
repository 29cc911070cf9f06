"""Detections in the LiDAR frame -> nuScenes' submission format in the global frame.

Format: https://www.nuscenes.org/object-detection, section "Results format".
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from nuscenes.eval.common.config import config_factory
from pyquaternion import Quaternion

from bevfusion.errors import InputError

CONFIG = config_factory("detection_cvpr_2019")
MOVING_SPEED = 0.2  # m/s; the limit of BEVFusion's result files
# class -> (attribute when moving, attribute when still): the choice of BEVFusion's result files
ATTRIBUTES = {
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "traffic_cone": ("", ""),
    "barrier": ("", ""),
}


def to_submission(
    results: Sequence[Mapping],
    infos: Sequence[Mapping],
    classes: Sequence[str],
    modality: Mapping[str, bool] | None = None,
) -> dict:
    """Convert one result a frame to a nuScenes submission.

    Args:
        results: dicts with boxes_3d (LiDARInstance3DBoxes of 9 columns), scores_3d and labels_3d (M,).
        infos: the frames' info entries (token and poses), in the same order.
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
    frames = {
        info["token"]: _convert_frame(result, info, np.array(classes))
        for result, info in zip(results, infos, strict=True)
    }
    return {"meta": {sensor: bool(used.get(sensor, False)) for sensor in sensors}, "results": frames}


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


def _convert_frame(result: Mapping, info: Mapping, classes: np.ndarray) -> list[dict]:
    """Submission entries of one frame, in the order of its detections, out-of-range ones left out."""
    boxes = result["boxes_3d"].tensor.detach().cpu().numpy().astype(np.float64)
    scores = result["scores_3d"].detach().cpu().numpy().astype(np.float64)
    labels = result["labels_3d"].detach().cpu().numpy()
    if not np.isfinite(boxes).all() or not np.isfinite(scores).all():
        raise InputError(f"the model's detections for sample {info['token']} are not finite: it can't be evaluated")
    lidar2ego, ego2global = Quaternion(info["lidar2ego_rotation"]), Quaternion(info["ego2global_rotation"])
    centres = boxes[:, :3] + boxes[:, 5:6] * (0, 0, 0.5)
    in_ego = centres @ lidar2ego.rotation_matrix.T + info["lidar2ego_translation"]
    names = classes[labels]
    limits = np.array([CONFIG.class_range[name] for name in names], dtype=np.float64)
    keep = np.flatnonzero(np.hypot(in_ego[:, 0], in_ego[:, 1]) <= limits)
    if len(keep) > CONFIG.max_boxes_per_sample:  # the devkit refuses more: keep the best, in their order
        keep = np.sort(keep[np.argsort(-scores[keep], kind="stable")[: CONFIG.max_boxes_per_sample]])
    boxes, names = boxes[keep], names[keep]
    centres = in_ego[keep] @ ego2global.rotation_matrix.T + info["ego2global_translation"]
    turn = (ego2global * lidar2ego).normalised
    velocities = np.pad(boxes[:, 7:9], ((0, 0), (0, 1))) @ turn.rotation_matrix.T
    speeds = np.hypot(velocities[:, 0], velocities[:, 1])
    columns = zip(
        centres.tolist(),
        boxes[:, [4, 3, 5]].tolist(),
        _yawed(turn, boxes[:, 6]).tolist(),
        velocities[:, :2].tolist(),
        names.tolist(),
        scores[keep].tolist(),
        [ATTRIBUTES[name][0 if speed > MOVING_SPEED else 1] for name, speed in zip(names, speeds, strict=True)],
        strict=True,
    )
    fields = ("translation", "size", "rotation", "velocity", "detection_name", "detection_score", "attribute_name")
    return [{"sample_token": info["token"], **dict(zip(fields, row, strict=True))} for row in columns]


def _yawed(turn: Quaternion, yaw: np.ndarray) -> np.ndarray:
    """(M, 4) quaternions (w, x, y, z) of `turn` after rotations by `yaw` (M,) about the z axis."""
    w, x, y, z = turn.elements
    cos, sin = np.cos(yaw / 2), np.sin(yaw / 2)
    return np.stack([w * cos - z * sin, x * cos + y * sin, y * cos - x * sin, z * cos + w * sin], axis=1)
