"""Which input voxel each tap of a sparse convolution reads for each output voxel, from coordinates alone."""

import torch
from spconv.pytorch import SparseConvTensor
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor

from lean.errors import QuantizationError


def neighbours(conv: SparseConvolution, x: SparseConvTensor, y: SparseConvTensor) -> Tensor:
    """Rows of `x` that make up each row of `y`, the output of `conv`: int64 (taps, V'), -1 where there is no voxel.

    Taps are in the order of the weight's kernel axes. No algorithm's rulebook is read, so that the answer is the same
    on every device.

    Raises:
        QuantizationError: `conv` is transposed or inverse, which BEVFusion has not.
    """
    if conv.transposed or conv.inverse:
        raise QuantizationError("the pairs of a transposed or inverse sparse convolution can't be listed")
    device, grid = x.indices.device, torch.tensor(x.spatial_shape, device=x.indices.device)
    kernel, stride, padding, dilation = (
        torch.tensor(value, device=device) for value in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    )
    if conv.subm:  # centred, whatever its padding says
        stride, padding = torch.ones_like(stride), kernel // 2 * dilation
    taps = torch.cartesian_prod(*(torch.arange(size, device=device) for size in conv.kernel_size))
    taps = taps.reshape(-1, len(conv.kernel_size))
    if len(x.indices) == 0:
        return torch.full((len(taps), len(y.indices)), -1, device=device)
    keys, rows = _keys(x.indices.long(), grid).sort()
    found = []
    for tap in taps:
        wanted = y.indices.long().clone()
        wanted[:, 1:] = wanted[:, 1:] * stride - padding + tap * dilation
        inside = ((wanted[:, 1:] >= 0) & (wanted[:, 1:] < grid)).all(dim=1)
        key = _keys(wanted, grid)
        place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
        found.append(torch.where(inside & (keys[place] == key), rows[place], -1))
    return torch.stack(found)


def _keys(indices: Tensor, grid: Tensor) -> Tensor:
    """One integer for each (batch, x, y, z) inside `grid`."""
    key = indices[:, 0]
    for axis, size in enumerate(grid):
        key = key * size + indices[:, axis + 1]
    return key
