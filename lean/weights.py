"""Choosing amax of weights, from the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from lean.errors import QuantizationError
from lean.kernels import fake_quantize

STEPS_PER_OCTAVE = 64  # MSE candidates are largest * 2^(-i / 64): neighbours differ by 1.1 %
OCTAVES = 2


def weight_amax(
    weight: Tensor, axis: int | None, method: str = "max", *, num_bits: int = 8, narrow_range: bool = False
) -> Tensor:
    """amax of a weight, one for each index of `axis` (all other axes 1), or one in all (0-dimensional) if axis is None.

    weight: floating, any shape. `max` takes the largest |w|; `mse` the candidate largest * 2^(-i / 64), i = 0 ... 128,
    whose fake-quantised weights are nearest, measured on the weights themselves. Returns float32 on the device of
    `weight`.
    Raises QuantizationError for an unknown method or non-finite weights.
    """
    if method not in ("max", "mse"):
        raise QuantizationError(f"unknown method {method!r} for weights: choose max or mse")
    values = weight.detach().float()
    rows = values.reshape(1, -1) if axis is None else values.movedim(axis, 0).flatten(1).contiguous()
    largest = rows.abs().amax(dim=1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise QuantizationError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: check the checkpoint")
    amax = largest
    if method == "mse":
        best = torch.full_like(largest, torch.inf, dtype=torch.float64)
        for step in range(OCTAVES * STEPS_PER_OCTAVE + 1):
            candidate = largest * 2.0 ** (-step / STEPS_PER_OCTAVE)
            off = fake_quantize(rows, candidate, num_bits, False, narrow_range).sub_(rows)
            error = torch.linalg.vector_norm(off, dim=1, keepdim=True, dtype=torch.float64)
            amax = torch.where(error < best, candidate, amax)
            best = torch.minimum(error, best)
    if axis is None:
        return amax.reshape(())
    return amax.reshape([-1 if i == axis % weight.dim() else 1 for i in range(weight.dim())])
