"""Augmentation of the 3D scene: rotation, scale, translation, flips, and dropping boxes out of range."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bevfusion.registry import PIPELINES


@PIPELINES.register_module()
class GlobalRotScaleTrans:
    """Rotate, shift, then scale points and boxes; `lidar_aug_matrix` (4, 4) float32 maps old to new coordinates.

    Args:
        resize_lim: range of the scale.
        rot_lim: range of the angle, radians, clockwise seen from above.
        trans_lim: standard deviation of the shift along each axis, metres.
        is_train: whether to draw at random; otherwise nothing changes.
    """

    def __init__(self, resize_lim: Sequence[float], rot_lim: Sequence[float], trans_lim: float, is_train: bool):
        self.resize_lim, self.rot_lim, self.trans_lim, self.is_train = resize_lim, rot_lim, trans_lim, is_train

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        transform = np.eye(4, dtype=np.float32)
        if self.is_train:
            scale = np.random.uniform(*self.resize_lim)
            angle = np.random.uniform(*self.rot_lim)
            shift = np.array([np.random.normal(0, self.trans_lim) for _ in range(3)])
            for key in ("points", "gt_bboxes_3d"):
                if key in data:
                    data[key].rotate(-angle)
                    data[key].translate(shift)
                    data[key].scale(scale)
            cos, sin = np.cos(angle), np.sin(angle)
            transform[:3, :3] = scale * np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
            transform[:3, 3] = scale * shift
        data["lidar_aug_matrix"] = transform
        return data


@PIPELINES.register_module()
class RandomFlip3D:
    """Mirror the scene left-right and front-back, each with probability 1/2; updates `lidar_aug_matrix`."""

    # direction in mmdet3d's words -> axis of coordinates that changes its sign, axis of the map masks (C, X, Y) turned
    AXES = (("horizontal", 1, 2), ("vertical", 0, 1))

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        drawn = [np.random.choice([0, 1]) for _ in self.AXES]
        for (direction, axis, mask_axis), flip in zip(self.AXES, drawn, strict=True):
            if not flip:
                continue
            for key in ("points", "gt_bboxes_3d"):
                if key in data:
                    data[key].flip(direction)
            if "gt_masks_bev" in data:
                data["gt_masks_bev"] = np.flip(data["gt_masks_bev"], mask_axis).copy()
            data["lidar_aug_matrix"][axis] *= -1
        return data


@PIPELINES.register_module()
class ObjectRangeFilter:
    """Drop boxes whose centre is not strictly inside the range in x and y; yaws are brought into [-pi, pi).

    Args:
        point_cloud_range: (x_min, y_min, z_min, x_max, y_max, z_max), metres.
    """

    def __init__(self, point_cloud_range: Sequence[float]):
        self.bev_range = np.array(point_cloud_range, dtype=np.float32)[[0, 1, 3, 4]]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        inside = data["gt_bboxes_3d"].in_range_bev(self.bev_range)
        data["gt_bboxes_3d"] = data["gt_bboxes_3d"][inside]
        data["gt_labels_3d"] = data["gt_labels_3d"][inside.numpy()]
        data["gt_bboxes_3d"].limit_yaw(offset=0.5, period=2 * np.pi)
        return data
