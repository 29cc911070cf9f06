"""Quantised dense convolutions."""

from typing import Self

from torch import Tensor, nn

from lean.layers.base import LayerSpec, QuantLayer


def _arguments(conv: nn.Conv2d | nn.ConvTranspose2d) -> dict:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None, "device": "meta"}


class QuantConv2d(QuantLayer, nn.Conv2d):
    """2D convolution with one input scale and one weight scale per output channel."""

    @classmethod
    def from_float(cls, module: nn.Conv2d, spec: LayerSpec) -> Self:
        """Return the quantised form of `module`, sharing its parameters."""
        return cls(**_arguments(module))._adopt(module, spec, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        return self._conv_forward(self._input_quantizer(x), self._weight_quantizer(self.weight), self.bias)


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """2D transposed convolution with one input scale and one weight scale per index of the recipe's axis."""

    @classmethod
    def from_float(cls, module: nn.ConvTranspose2d, spec: LayerSpec) -> Self:
        """Return the quantised form of `module`, sharing its parameters."""
        new = cls(**_arguments(module), output_padding=module.output_padding)
        return new._adopt(module, spec, axis=spec.transposed_axis)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        return nn.functional.conv_transpose2d(
            self._input_quantizer(x),
            self._weight_quantizer(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )
