"""Lift-splat pooling as one weighted sum per BEV cell, without the (camera, depth, height, width, channel) volume."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PoolingPlan(NamedTuple):
    """The part of BEV pooling that depends on the camera geometry alone; all (K,) int64, sorted by cell.

    Attributes:
        pairs: flat index into the depth weights (B*N, D, H, W) of each frustum point inside the grid.
        pixels: flat index into the pixels (B*N, H, W) of the same point.
        offsets: (B*Z*X*Y,) where each cell's run of points begins.
    """

    pairs: Tensor
    pixels: Tensor
    offsets: Tensor


def plan_pooling(cells: Tensor, grid: tuple[int, int, int]) -> PoolingPlan:
    """Sort the frustum points by the BEV cell they fall into.

    Args:
        cells: (B, N, D, H, W, 3) int64, cell indices along x, y, z.
        grid: number of cells along x, y, z.
    """
    batch, _, depths, height, width, _ = cells.shape
    nx, ny, nz = grid
    x, y, z = cells.unbind(-1)
    inside = (x >= 0) & (x < nx) & (y >= 0) & (y < ny) & (z >= 0) & (z < nz)
    frame = torch.arange(batch, device=cells.device).view(-1, 1, 1, 1, 1)
    flat = (((frame * nz + z) * nx + x) * ny + y)[inside]
    pairs = inside.flatten().nonzero().squeeze(1)
    flat, order = torch.sort(flat, stable=True)
    pairs = pairs[order]
    area = height * width
    pixels = pairs // (depths * area) * area + pairs % area
    every_cell = torch.arange(batch * nz * nx * ny, device=cells.device)
    return PoolingPlan(pairs, pixels, torch.searchsorted(flat, every_cell))


def bev_pool(depth: Tensor, context: Tensor, plan: PoolingPlan, batch: int, grid: tuple[int, int, int]) -> Tensor:
    """Sum depth-weighted context features into the BEV grid; differentiable in both.

    Follows BEVFusion's `bev_pool` (Liu et al., 2022): a cell holds the sum over the frustum points inside it.

    Args:
        depth: (B*N, D, H, W) depth distribution of each pixel.
        context: (B*N, C, H, W) features of each pixel.
        plan: where each (pixel, depth) pair falls, from `plan_pooling`.

    Returns:
        (B, Z*C, X, Y), the layers of height stacked along the channels, lowest first.
    """
    nx, ny, nz = grid
    channels = context.shape[1]
    table = context.permute(0, 2, 3, 1).reshape(-1, channels)
    weights = depth.flatten()[plan.pairs].to(table.dtype)
    cells = F.embedding_bag(plan.pixels, table, plan.offsets, mode="sum", per_sample_weights=weights)
    return cells.view(batch, nz, nx, ny, channels).permute(0, 1, 4, 2, 3).reshape(batch, nz * channels, nx, ny)
