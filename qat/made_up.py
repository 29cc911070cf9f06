"""A made-up frame, for a run that has a model but no data."""

from typing import Any

import torch
from torch import Tensor, nn

CAMERAS, POINTS = 2, 20_000


def made_up_batch(model: nn.Module) -> dict[str, Any]:
    """One frame for `model(**batch)`, always the same: points all over the grid, images of noise.

    Good for comparing a model with itself; what it finds there means nothing.
    """
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {"points": [_points(model, generator)], "metas": [{"token": "made up"}]}
    if "camera" in model.encoders:
        height, width = model.encoders["camera"]["vtransform"].image_size
        batch["img"] = torch.randn(1, CAMERAS, 3, height, width, generator=generator)
        batch |= _geometry(height, width)
    return batch


def _points(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Points (P, C) spread evenly over the voxel grid, or 20 m around; further features lie between 0 and 1."""
    if "lidar" not in model.encoders:
        return torch.rand(POINTS, 5, generator=generator) * torch.tensor([40, 40, 4, 1, 1]) - torch.tensor(
            [20, 20, 2, 0, 0]
        )
    voxelize, backbone = (model.encoders["lidar"][part] for part in ("voxelize", "backbone"))
    channels = next(module.in_channels for module in backbone.modules() if hasattr(module, "in_channels"))
    points = torch.rand(POINTS, channels, generator=generator)
    points[:, :3] = voxelize.lower + points[:, :3] * voxelize.voxel_size * voxelize.grid_size
    return points


def _geometry(height: int, width: int) -> dict[str, Tensor]:
    """Matrices of cameras at the LiDAR's place that look along x, and from there on to the left."""
    intrinsics = torch.eye(4).repeat(CAMERAS, 1, 1)
    intrinsics[:, :2, :3] = torch.tensor([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2]])
    camera2lidar = torch.eye(4).repeat(CAMERAS, 1, 1)
    for camera, angle in enumerate(torch.arange(CAMERAS) * (2 * torch.pi / CAMERAS)):
        cosine, sine = angle.cos(), angle.sin()
        axes = [[sine, -cosine, 0], [0, 0, -1], [cosine, sine, 0]]  # right, down, forward
        camera2lidar[camera, :3, :3] = torch.tensor(axes).T
    return {
        "camera_intrinsics": intrinsics[None],
        "camera2lidar": camera2lidar[None],
        "lidar2image": (intrinsics @ torch.linalg.inv(camera2lidar))[None],
        "img_aug_matrix": torch.eye(4).repeat(1, CAMERAS, 1, 1),
        "lidar_aug_matrix": torch.eye(4)[None],
    }
