"""Data roots and configs for the tests of the data layer."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bevfusion.boxes import lidar_to_legacy

CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip
SMALL_RANGE = [-54.0, -54.0, -5.0, 54.0, 54.0, 30.0]


def reference_config(golden: Path) -> dict[str, Any]:
    """The resolved ResNet-50 config of the original."""
    return json.loads((golden / "config_resnet50_convfuser.json").read_text())


def reference_info(golden: Path) -> dict[str, Any]:
    """The real keyframe's info entry in the original layout."""
    return json.loads((golden / "realframe_info.json").read_text())["infos"][0]


def write_infos(path: Path, infos: Sequence[Mapping[str, Any]], version: str = "v1.0-mini") -> str:
    """Write an info file in the original layout as JSON."""
    path.write_text(json.dumps({"infos": infos, "metadata": {"version": version}}))
    return str(path)


def many_infos(golden: Path, scenes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Entries without files: so many keyframes in each scene, interleaved in no particular order."""
    infos = []
    for number, (scene, frames) in enumerate(scenes.items()):
        for index in range(frames):
            info = copy.deepcopy(reference_info(golden))
            time = 1_532_402_927_000_000 + number * 60_000_000 + index * 500_000
            infos.append({**info, "token": f"{scene}-{index}", "scene_token": scene, "timestamp": time})
    return infos[::-1]


def dataset_config(
    cfg: Mapping[str, Any], which: str, root: Path, ann_file: str | Path, **steps: Any
) -> dict[str, Any]:
    """Config of the frames in `ann_file` through a pipeline; `steps` gives transforms options, None drops one."""
    inner = cfg["data"]["train"]["dataset"] if which == "train" else cfg["data"]["test"]
    pipeline = [
        {**step, **steps.get(step["type"], {})} for step in inner["pipeline"] if steps.get(step["type"], {}) is not None
    ]
    return {**inner, "dataset_root": str(root), "ann_file": str(ann_file), "pipeline": pipeline}


def small_steps(**more: Any) -> dict[str, Any]:
    """Options that fit the pipelines to TinyNuScenes: 160x90 images, clutter up to 12 m high."""
    return {
        "ImageAug3D": {"final_dim": [32, 64]},
        "PointsRangeFilter": {"point_cloud_range": SMALL_RANGE},
        "LoadBEVSegmentation": None,
        "ObjectPaste": None,
        **more,
    }


def legacy_boxes(boxes) -> np.ndarray:
    """Project boxes in the convention of the original's info files: gravity centre, width before length."""
    values = boxes.tensor.clone()
    values[:, :3] = boxes.gravity_center
    return lidar_to_legacy(values).numpy()


def angle_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b brought into [-pi, pi)."""
    return (a - b + np.pi) % (2 * np.pi) - np.pi
