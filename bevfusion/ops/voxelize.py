"""Hard voxelisation followed by the mean of each voxel's points."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bevfusion.errors import InputError


def voxelize_mean(
    points: Tensor, voxel_size: Tensor, lower: Tensor, grid_size: Tensor, max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor]:
    """Average the first `max_points` points of each of the first `max_voxels` voxels, both in the order of `points`.

    Sort-based, so that CPU and CUDA give the same voxels in the same order without atomics. Follows the deterministic
    `hard_voxelize` of mmdet3d and its `HardSimpleVFE`.

    Args:
        points: (P, C) float, x, y, z in metres first.
        voxel_size, lower: (3,) float, metres, x, y, z.
        grid_size: (3,) int64, cells along x, y, z.

    Returns:
        features (V, C) float and coordinates (V, 3) int32 (x, y, z).
    """
    cells = torch.floor((points[:, :3] - lower) / voxel_size).long()
    inside = ((cells >= 0) & (cells < grid_size)).all(dim=1)
    points, cells = points[inside], cells[inside]
    if len(points) == 0:
        return points, cells.int()

    key = (cells[:, 0] * grid_size[1] + cells[:, 1]) * grid_size[2] + cells[:, 2]
    key, order = torch.sort(key, stable=True)
    _, counts = torch.unique_consecutive(key, return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(key), device=key.device) - torch.repeat_interleave(starts, counts)
    kept = order[rank < max_points]
    means = torch.segment_reduce(points[kept], "mean", lengths=counts.clamp(max=max_points))

    first = order[starts]
    by_arrival = torch.argsort(first)[:max_voxels]
    return means[by_arrival], cells[first[by_arrival]].int()


class Voxelization(nn.Module):
    """Points to mean-feature voxels, with the limits of a BEVFusion config.

    Args:
        voxel_size: cell size along x, y, z in metres.
        point_cloud_range: (x_min, y_min, z_min, x_max, y_max, z_max) in metres.
        max_num_points: points averaged per voxel.
        max_voxels: most voxels a frame, one number or (training, testing).

    Attributes:
        half_features: round the features to FP16, in which the CUDA runtime keeps them.
    """

    half_features = False

    def __init__(
        self,
        voxel_size: Sequence[float],
        point_cloud_range: Sequence[float],
        max_num_points: int,
        max_voxels: int | Sequence[int] = 20000,
    ):
        super().__init__()
        if max_num_points < 1:
            raise InputError(f"voxelize.max_num_points must be positive, not {max_num_points} (dynamic voxels)")
        self.max_num_points = max_num_points
        self.max_voxels = (max_voxels, max_voxels) if isinstance(max_voxels, int) else tuple(max_voxels)
        size = torch.tensor(voxel_size, dtype=torch.float32)
        bounds = torch.tensor(point_cloud_range, dtype=torch.float32)
        self.register_buffer("voxel_size", size, persistent=False)
        self.register_buffer("lower", bounds[:3], persistent=False)
        self.register_buffer("grid_size", torch.round((bounds[3:] - bounds[:3]) / size).long(), persistent=False)

    @torch.no_grad()
    def forward(self, points: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Voxelise a batch of point clouds, a list of (P_i, C).

        Returns:
            features (V, C) float and coordinates (V, 4) int32 (batch, x, y, z).
        """
        limit = self.max_voxels[0 if self.training else 1]
        features, coordinates = [], []
        for index, cloud in enumerate(points):
            mean, cell = voxelize_mean(
                cloud.float(), self.voxel_size, self.lower, self.grid_size, self.max_num_points, limit
            )
            features.append(mean.half().float() if self.half_features else mean)
            coordinates.append(nn.functional.pad(cell, (1, 0), value=index))
        return torch.cat(features), torch.cat(coordinates)
