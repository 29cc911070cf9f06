"""What all quantised layers have in common."""

from dataclasses import dataclass
from typing import Self

from torch import nn

from lean.quantizer import Quantizer
from lean.recipe import QuantizerSpec


@dataclass(frozen=True)
class LayerSpec:
    """What a layer needs to know to be quantised.

    Attributes:
        inputs: for joins, which inputs pass the quantizer (`all` or `second`).
        transposed_axis: scale axis of a transposed convolution's weight.
    """

    activation: QuantizerSpec
    weight: QuantizerSpec
    inputs: str = "all"
    transposed_axis: int = 0


class QuantLayer(nn.Module):
    """Mixin of quantised layers: an `_input_quantizer`, and a `_weight_quantizer` if the layer has a weight.

    A quantised layer shares its float layer's parameters, never changes them, and never writes into its input.
    """

    _input_quantizer: Quantizer

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> Self:
        """Return the quantised form of `module`."""
        raise NotImplementedError

    def _adopt(self, module: nn.Module, spec: LayerSpec, axis: int) -> Self:
        """Take over `module`'s parameters and training flag, and create both quantizers."""
        self.weight, self.bias = module.weight, module.bias
        self._input_quantizer = Quantizer(spec.activation)
        self._weight_quantizer = Quantizer(spec.weight, axis)
        return self.train(module.training)

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """The input quantizer and, if the layer has a weight, the weight quantizer."""
        names = ("_input_quantizer", "_weight_quantizer")
        return tuple(self._modules[name] for name in names if name in self._modules)

    @property
    def is_disabled(self) -> bool:
        """Whether the layer computes in floating point: none of its quantizers is on."""
        return all(quantizer._disabled for quantizer in self.quantizers)
