"""The last steps: tensors in mmcv's DataContainers, and the keys that a model takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmcv.parallel import DataContainer

from bevfusion.errors import InputError
from bevfusion.registry import PIPELINES

META_KEYS = (
    "token", "sample_idx", "timestamp", "filename", "lidar_path", "ori_shape", "img_shape", "img_norm_cfg",
    "lidar2image", "box_type_3d", "box_mode_3d",
)  # fmt: skip


@PIPELINES.register_module()
class DefaultFormatBundle3D:
    """Wrap images, points, boxes and labels in DataContainers, which tell mmcv how to batch them.

    Args:
        classes: accepted for the configs' sake; labels are set by the data set.

    Raises:
        InputError: no point is left.
    """

    def __init__(self, classes: Sequence[str] = ()):
        self.classes = tuple(classes)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        if "points" in data:
            if len(data["points"]) == 0:
                raise InputError(f"point cloud {data['lidar_path']} has no point inside point_cloud_range")
            data["points"] = DataContainer(data["points"].tensor)
        if "img" in data:
            data["img"] = DataContainer(data["img"], stack=True, pad_dims=None)
        if "gt_labels_3d" in data:
            data["gt_labels_3d"] = DataContainer(torch.as_tensor(data["gt_labels_3d"], dtype=torch.int64))
        if "gt_bboxes_3d" in data:
            data["gt_bboxes_3d"] = DataContainer(data["gt_bboxes_3d"], cpu_only=True)
        return data


@PIPELINES.register_module()
class Collect3D:
    """Keep what the model takes: `keys` as they are, `meta_keys` as tensors, the rest of interest in `metas`.

    `gt_masks_bev` may be absent: see `LoadBEVSegmentation`.

    Args:
        keys: entries to pass on.
        meta_keys: matrices to pass on, where they exist.
        meta_lis_keys: entries of the `metas` dict, where they exist.

    Raises:
        InputError: one of `keys` is absent.
    """

    OPTIONAL = ("gt_masks_bev",)

    def __init__(
        self,
        keys: Sequence[str],
        meta_keys: Sequence[str] = ("camera_intrinsics", "camera2ego", "img_aug_matrix", "lidar_aug_matrix"),
        meta_lis_keys: Sequence[str] = META_KEYS,
    ):
        self.keys, self.meta_keys, self.meta_lis_keys = keys, meta_keys, meta_lis_keys

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        missing = [key for key in self.keys if key not in data and key not in self.OPTIONAL]
        if missing:
            raise InputError(f"Collect3D: no transform of the pipeline makes {', '.join(missing)}")
        out = {key: data[key] for key in self.keys if key in data}
        for key in self.meta_keys:
            if key in data:
                out[key] = DataContainer(torch.as_tensor(np.asarray(data[key])), stack=True, pad_dims=None)
        metas = {key: data[key] for key in self.meta_lis_keys if key in data}
        out["metas"] = DataContainer(metas, cpu_only=True)
        return out
