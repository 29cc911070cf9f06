"""Bias correction: shifts each layer's bias by the mean error that quantisation causes in its output.

Follows Nagel et al. (2019), "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, in
its empirical form: means are measured on data.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from spconv.pytorch import SparseConvTensor
from torch import Tensor, nn

from lean.calibrate import check_calibrated, evaluating
from lean.errors import QuantizationError
from lean.layers import QuantLayer
from lean.switches import disable_quantization, quantized_layers


def correct_biases(model: nn.Module, forward: Callable[[], Any]) -> dict[str, float]:
    """Correct the biases of the layers that are in INT8, in forward order, in place.

    `forward` runs all frames as one batch, twice: through the float network, whose channel means are kept, and through
    the quantised one, in which each layer's bias is corrected as soon as it has run, so that every later layer already
    sees the corrected output. A layer without bias gets one.

    Returns:
        By layer, the largest shift of a channel's bias.

    Raises:
        QuantizationError: the model isn't calibrated, or a mean is not finite.
    """
    check_calibrated(model)
    layers = {n: m for n, m in quantized_layers(model).items() if not m.is_disabled and hasattr(m, "_weight_quantizer")}
    wanted: dict[str, Tensor] = {}
    shifts: dict[str, float] = {}
    with torch.no_grad(), evaluating(model):
        with disable_quantization(model), ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_hook(partial(_keep_mean, name, wanted)).remove)
            forward()
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_hook(partial(_correct, name, wanted, shifts)).remove)
            forward()
    return shifts


def channel_means(output: Tensor | SparseConvTensor, layer: QuantLayer) -> Tensor:
    """Mean of each output channel (C,) float32: a convolution's channels are on dim 1, a linear layer's on the last."""
    values = output.features if isinstance(output, SparseConvTensor) else output
    axis = values.dim() - 1 if isinstance(layer, nn.Linear) or isinstance(output, SparseConvTensor) else 1
    return values.float().mean(dim=[dim for dim in range(values.dim()) if dim != axis])


def _keep_mean(name: str, wanted: dict[str, Tensor], layer: QuantLayer, _: tuple, output: Any) -> None:
    means = channel_means(output, layer)
    if not torch.isfinite(means).all():
        raise QuantizationError(f"{name}: the mean of its output is not finite; check the data, or that there is any")
    wanted.setdefault(name, means)


def _correct(
    name: str, wanted: dict[str, Tensor], shifts: dict[str, float], layer: QuantLayer, _: tuple, output: Any
) -> Any:
    """Forward hook: shift the bias, and the output as the new bias would have shifted it."""
    if name in shifts:  # it runs a second time, with the bias that it has by now
        return output
    shift = (wanted[name] - channel_means(output, layer)).to(layer.weight.dtype)
    old = torch.zeros_like(shift) if layer.bias is None else layer.bias
    layer.bias = nn.Parameter(old + shift, layer.weight.requires_grad)
    shifts[name] = shift.abs().max().item()
    if isinstance(output, SparseConvTensor):
        return output.replace_feature(output.features + shift)
    return output + (shift if isinstance(layer, nn.Linear) else shift.view(-1, *[1] * (output.dim() - 2)))
