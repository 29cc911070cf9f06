"""Quantised sparse convolution."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Self

import torch
import torch.nn.functional as F
from spconv.core import ConvAlgo
from spconv.pytorch import SparseConvTensor
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor, nn

from lean.errors import QuantizationError
from lean.layers.base import LayerSpec, QuantLayer
from lean.threads import cpu_threads

COPIED = (
    *("ndim", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "subm"),
    *("output_padding", "transposed", "inverse", "indice_key", "fp32_accum", "record_voxel_count", "name"),
)


def output_axis(shape: Sequence[int], kernel: Sequence[int], in_channels: int, out_channels: int) -> int:
    """Tell which axis of a sparse convolution's weight holds the output channels.

    spconv 2 stores (out, *kernel, in), spconv 1 stored (*kernel, in, out).

    Raises:
        QuantizationError: `shape` is neither, or it could be both.
    """
    axes = {0: (out_channels, *kernel, in_channels), len(kernel) + 1: (*kernel, in_channels, out_channels)}
    fitting = [axis for axis, layout in axes.items() if layout == tuple(shape)]
    if len(fitting) == 1:
        return fitting[0]
    wanted = " or ".join(str(layout) for layout in axes.values())
    problem = f"could be either of {wanted}" if fitting else f"is neither {wanted}"
    raise QuantizationError(f"sparse convolution weight of shape {tuple(shape)} {problem}: output axis unknown")


class QuantSparseConvolution(QuantLayer, SparseConvolution):
    """Sparse convolution with one input scale and one weight scale per output channel.

    Attributes:
        activation: `none` or `relu`; applied to the output features, as the deployed kernel does.
    """

    activation = "none"

    # mmdet3d patches spconv to permute every weight of a state dict without metadata, whatever its layout.
    _load_from_state_dict = nn.Module._load_from_state_dict

    @classmethod
    def from_float(cls, module: SparseConvolution, spec: LayerSpec) -> Self:
        """Return the quantised form of `module`, sharing its parameters."""
        new = cls(**{name: getattr(module, name) for name in COPIED}, bias=module.bias is not None, device="meta")
        axis = output_axis(module.weight.shape, module.kernel_size, module.in_channels, module.out_channels)
        return new._adopt(module, spec, axis)

    @property
    def algo(self) -> ConvAlgo:
        """Algorithm by the weight's device: gather-scatter on the CPU (it has no other), implicit GEMM on CUDA."""
        weight = vars(self).get("_parameters", {}).get("weight")  # the constructor asks before there are any
        return ConvAlgo.MaskImplicitGemm if weight is not None and weight.is_cuda else ConvAlgo.Native

    @algo.setter
    def algo(self, _: ConvAlgo) -> None:
        """spconv's constructor assigns a choice that it made before the device was known."""

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Convolve features (V, in_channels) into (V', out_channels); `x` stays as it is.

        Where no gradient is wanted, quantised operands are multiplied as whole numbers, and the sums scaled afterwards,
        as in the INT8 kernels: float32 sums of whole numbers are exact up to 2^24, so that the result is the same in
        any order of summation, on any device.
        """
        features, weight = self._input_quantizer(x.features), self._weight_quantizer(self.weight)
        steps = None if torch.is_grad_enabled() else self._steps(features.dtype)
        if steps is not None:
            features, weight = ((value / step).round() for value, step in zip((features, weight), steps, strict=True))
        # spconv 2.3's gather-scatter on the CPU races with several threads.
        with nullcontext() if weight.is_cuda else cpu_threads(1):
            out = self._conv_forward(self.training, x.replace_feature(features), weight, None, name=self.name)
        features = out.features
        if steps is not None:
            features = features * (steps[0] * steps[1].flatten())
        if self.bias is not None:  # added here, because spconv has no bias on the CPU
            features = features + self.bias
        return out.replace_feature(F.relu(features) if self.activation == "relu" else features)

    def _steps(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """What one step of the input's and of the weight's integers is worth; None if either is not quantised now.

        Other types than float32 are left alone: FP16 can't hold the sums.
        """
        # The library's own quantizers, put here for comparison, don't tell.
        rounding = all(getattr(quantizer, "is_rounding", False) for quantizer in self.quantizers)
        if not rounding or dtype != torch.float32 or self.weight.dtype != torch.float32:
            return None
        return tuple(quantizer.step for quantizer in self.quantizers)
