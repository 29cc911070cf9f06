"""Quantised fully connected layer."""

from typing import Self

from torch import Tensor, nn

from lean.layers.base import LayerSpec, QuantLayer


class QuantLinear(QuantLayer, nn.Linear):
    """Linear map with one input scale and one weight scale per output feature."""

    @classmethod
    def from_float(cls, module: nn.Linear, spec: LayerSpec) -> Self:
        """Return the quantised form of `module`, sharing its parameters."""
        new = cls(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        return new._adopt(module, spec, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return nn.functional.linear(self._input_quantizer(x), self._weight_quantizer(self.weight), self.bias)
