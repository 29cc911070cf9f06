"""The two inner loops of post-training quantisation, for the CPU (Numba) and for CUDA (Triton)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lean.errors import QuantizationError

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
FUSED = frozenset((torch.float32, torch.float16))
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@cache
def _backend(on_cuda: bool):
    """The module with the kernels for a device; imported on use, as Triton and Numba may be absent."""
    if on_cuda:
        from lean.kernels import cuda

        return cuda
    from lean.kernels import cpu

    return cpu


def _dense(x: Tensor) -> Tensor:
    """`x` if its values lie side by side in memory, contiguous or channels-last, else a copy of which that is true."""
    if x.is_contiguous() or (x.dim() in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()])):
        return x
    return x.contiguous()


def observe(x: Tensor, counts: Tensor, extremes: Tensor) -> None:
    """Add the values of `x` to a histogram state, in one pass and, on CUDA, without synchronising with the host.

    x: float16, bfloat16, float32 or float64 (rounded to float32), any shape, strides and size, empty included;
    counts: int64 (SLOTS,) and extremes: int32 (2,) as in `lean.histogram.Histogram`, contiguous, on the device of `x`.
    Raises QuantizationError for another dtype or device.
    """
    if x.dtype not in FLOATS:
        raise QuantizationError(f"can't observe a {x.dtype} tensor: a quantizer's input has to be floating point")
    if x.device != counts.device:
        raise QuantizationError(f"can't observe a tensor on {x.device}: the counts are on {counts.device}")
    if x.numel():
        _backend(x.is_cuda).observe(_dense(x), counts, extremes)


def can_fake_quantize(x: Tensor, amax: Tensor) -> bool:
    """Whether `fake_quantize` takes these: float32 or float16, no gradient wanted, one amax or one per channel."""
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or amax.requires_grad)
    one_axis = amax.numel() == 1 or (amax.dim() == x.dim() and sum(size > 1 for size in amax.shape) == 1)
    return not wants_grad and x.dtype in FUSED and amax.dtype == torch.float32 and amax.device == x.device and one_axis


def fake_quantize(
    x: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = False
) -> Tensor:
    """Quantise to integers and back in one read and one write; equal to pytorch-quantization's `fake_tensor_quant`.

    scale = bound / amax, result = clamp(round(x * scale)) / scale with bound = 2^(num_bits - 1) - 1 (one more bit if
    unsigned), ties to even, all in float32; amax <= 2^-24 gives zeros. For float16, as in the library, the last
    division is by the scale rounded to float16. No gradient: see `can_fake_quantize`.

    x: any shape; amax: float32, one element, or one per channel with x.dim() axes (all of size 1 but one).
    Raises QuantizationError on a shape that doesn't fit and, on the CPU only (on CUDA a check would stall the device),
    for negative amax or negative values in an unsigned quantizer.
    """
    if not can_fake_quantize(x, amax):
        raise QuantizationError(
            f"can't fake-quantise {x.dtype} {tuple(x.shape)} on {x.device} with amax {amax.dtype} {tuple(amax.shape)} "
            f"on {amax.device}: needs float32 or float16 without gradient, and one float32 amax or one per channel"
        )
    high = 2 ** (num_bits - 1 + int(unsigned)) - 1
    low = 0 if unsigned else -high - int(not narrow_range)
    if amax.numel() == 1:
        x = _dense(x)
        inner = x.numel()
    else:
        axis = next(i for i, size in enumerate(amax.shape) if size > 1)
        if amax.shape[axis] != x.shape[axis]:
            raise QuantizationError(f"amax {tuple(amax.shape)} doesn't fit a tensor of shape {tuple(x.shape)}")
        x, inner = x.contiguous(), math.prod(x.shape[axis + 1 :])
    out = torch.empty_like(x)  # in the same layout, as `x` is dense
    if x.numel():
        _backend(x.is_cuda).fake_quantize(x, amax, out, inner, low, high)
    return out
