"""Quantised joins: all their inputs get one scale, as TensorRT and libspconv want it."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from lean.layers.base import LayerSpec, QuantLayer
from lean.quantizer import Quantizer


class QuantAdd(QuantLayer):
    """Residual add; one quantizer for both inputs, or for the identity alone.

    Args:
        inputs: `all` (sparse blocks: libspconv adds two INT8 tensors) or `second` (dense blocks: TensorRT fuses the
            add into the preceding convolution, whose sum is still float, and reads the identity as INT8).
    """

    def __init__(self, quantizer: Quantizer, inputs: str):
        super().__init__()
        self.inputs = inputs
        self._input_quantizer = quantizer

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> Self:
        """Return the quantised form of the parameterless `module`."""
        return cls(Quantizer(spec.activation), spec.inputs).train(module.training)

    def forward(self, out: Tensor, identity: Tensor) -> Tensor:
        """Return `out + identity` of two tensors of one shape."""
        first = self._input_quantizer(out) if self.inputs == "all" else out
        return first + self._input_quantizer(identity)


class QuantConcat(QuantLayer):
    """Concatenation along `dim` with one quantizer for all inputs."""

    def __init__(self, quantizer: Quantizer, dim: int):
        super().__init__()
        self.dim = dim
        self._input_quantizer = quantizer

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> Self:
        """Return the quantised form of `module`, which has a `dim`."""
        return cls(Quantizer(spec.activation), module.dim).train(module.training)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the quantised tensors joined along `dim`."""
        return torch.cat([self._input_quantizer(tensor) for tensor in tensors], dim=self.dim)
