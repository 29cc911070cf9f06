"""Depth maps from LiDAR points, for models that are supervised with depth."""

from typing import Any

import torch

from bevfusion.registry import PIPELINES


@PIPELINES.register_module()
class GTDepth:
    """Project the points into the augmented images: `depths` (N, H, W) float32, metres, 0 where there is no point.

    Stands after `Collect3D`. Where points share a pixel, the later one counts.

    Args:
        keyframe_only: use only points with time lag 0.
    """

    def __init__(self, keyframe_only: bool = False):
        self.keyframe_only = keyframe_only

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        points, images = data["points"].data, data["img"].data
        image_aug, lidar_aug = data["img_aug_matrix"].data, data["lidar_aug_matrix"].data
        if self.keyframe_only:
            points = points[points[:, 4] == 0]
        xyz = torch.linalg.solve(lidar_aug[:3, :3], (points[:, :3] - lidar_aug[:3, 3]).T)  # as before augmentation
        lidar2image = data["lidar2image"].data
        projected = lidar2image[:, :3, :3] @ xyz + lidar2image[:, :3, 3:]
        distance = projected[:, 2].clone()
        depth = distance.clamp(1e-5, 1e5)
        pixels = torch.stack([projected[:, 0] / depth, projected[:, 1] / depth, depth], dim=1)
        pixels = image_aug[:, :3, :3] @ pixels + image_aug[:, :3, 3:]
        height, width = images.shape[-2:]
        column, row = pixels[:, 0], pixels[:, 1]
        visible = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        depths = torch.zeros(len(images), height, width)
        for camera, mask in enumerate(visible):
            depths[camera, row[camera, mask].long(), column[camera, mask].long()] = distance[camera, mask]
        data["depths"] = depths
        return data
