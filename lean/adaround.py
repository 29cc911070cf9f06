"""Adaptive rounding: weights go up or down so that a layer's output comes nearest to the float one, not each weight.

The objective is AdaRound's (Nagel et al., 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"). A
layer's output is linear in its weights, so its squared error is a quadratic form of them, and two sums over the
calibration data say all about it: no data has to be kept. It is minimised by turning round, in every output channel at
once, the one weight that helps most, until none helps: the error falls with every step. AdaRound's own relaxation by
sigmoids ended at more than twice the error on random problems of up to 576 weights, and took fifty times as long.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from spconv.pytorch import SparseConvTensor
from torch import Tensor, nn

from lean.calibrate import check_calibrated, evaluating
from lean.errors import QuantizationError
from lean.layers import QuantConv2d, QuantLayer, QuantLinear, QuantSparseConvolution
from lean.matching import no_match
from lean.rulebook import neighbours
from lean.switches import disable_quantization, quantized_layers, quantizer_flags, unwrap

COLUMNS = 8192  # output positions of a frame that count, at most
FLIPS = 4  # steps at most, as a multiple of the weights of an output channel
LEAST = 1e-6  # a flip must lessen the error of its channel by this part of it


@dataclass
class Moments:
    """Sums over output positions that a layer's error is computed from.

    With x the K quantised input values that an output is made of, W the float weights (out, K), y the float output
    (out,) without bias and r = W x - y what quantising the input alone changes:

    inputs: x x^T (K, K); cross: r x^T (out, K); base: r^2 (out,); power: y^2 (out,).
    """

    inputs: Tensor
    cross: Tensor
    base: Tensor
    power: Tensor

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, weight: Tensor) -> Self:
        """From quantised inputs (K, n), float outputs (out, n) and float weights (out, K)."""
        off = weight @ inputs - outputs
        squares = (values.square().sum(dim=1) for values in (off, outputs))
        return cls(inputs @ inputs.T, off @ inputs.T, *squares)

    def __add__(self, other: Self) -> Self:
        """The moments of both sets of positions."""
        return Moments(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def error(self, change: Tensor) -> Tensor:
        """Squared error (out,) of the outputs when the weights are changed by `change` (out, K)."""
        return ((change @ self.inputs + 2 * self.cross) * change).sum(dim=1) + self.base


def can_round(layer: QuantLayer) -> bool:
    """Whether a layer's weights can be rounded adaptively: no groups, no transposed convolution, in INT8."""
    kinds = QuantConv2d, QuantLinear, QuantSparseConvolution
    return isinstance(layer, kinds) and not layer.is_disabled and getattr(layer, "groups", 1) == 1


def round_weights(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable,
    forward: Callable[[nn.Module, Any], Any],
) -> dict[str, tuple[float, float]]:
    """Put the weights of layers on their quantizers' grid, chosen for what they do to the batches, in place.

    Every weight becomes one of its two neighbouring grid points, so that the layer's quantizer, whose amax stays,
    returns it as it is.

    Returns:
        By layer, error over power of its output (on its float input, quantised), with nearest and with chosen rounding.

    Raises:
        QuantizationError: the model isn't calibrated, or a layer is unknown, can't be rounded, or saw no data.
    """
    check_calibrated(model)
    layers = quantized_layers(model)
    chosen = list(names)
    for name in chosen:
        if name not in layers:
            raise no_match(name, layers, "layer")
        if not can_round(layers[name]):
            raise QuantizationError(
                f"{name} can't be rounded adaptively: it is grouped, transposed, a join or in float"
            )
    found: dict[str, Moments] = {}
    with torch.no_grad(), evaluating(model), disable_quantization(unwrap(model)), ExitStack() as hooks:
        for name in chosen:
            hooks.callback(layers[name].register_forward_hook(partial(_collect, name, found)).remove)
        for batch in batches:
            forward(model, batch)
    unseen = [name for name in chosen if name not in found]
    if unseen:
        raise QuantizationError(f"no data reached {unseen[0]}: its weights can't be rounded by what they do")
    return {name: _round_layer(layers[name], found.pop(name)) for name in chosen}


def choose_rounding(weight: Tensor, scale: Tensor, moments: Moments, bounds: tuple[int, int] = (-128, 127)) -> Tensor:
    """Grid points (out, K), whole numbers, for weights (out, K) with step `scale` (out, 1).

    Each is one of the two around weight / scale, within `bounds`.
    """
    exact, channels = weight / scale, torch.arange(len(weight), device=weight.device)
    floor, grid = exact.floor(), exact.round().clamp(*bounds)
    error = moments.error(grid * scale - weight)
    slope = 2 * ((grid * scale - weight) @ moments.inputs + moments.cross)
    curvature = moments.inputs.diagonal()
    for _ in range(FLIPS * weight.shape[1]):
        other = torch.where(grid > floor, floor, floor + 1).clamp(*bounds)
        change = (other - grid) * scale
        gain, place = (change * (slope + change * curvature)).min(dim=1)
        useful = gain < -LEAST * error
        if not useful.any():
            break
        step = torch.where(useful, change[channels, place], 0.0)
        grid[channels, place] = torch.where(useful, other[channels, place], grid[channels, place])
        slope += 2 * step[:, None] * moments.inputs[place]
        error += torch.where(useful, gain, 0.0)
    return grid


def _round_layer(layer: QuantLayer, moments: Moments) -> tuple[float, float]:
    quantizer = layer._weight_quantizer
    last = 2 ** (quantizer.num_bits - 1) - 1
    bounds = (-last if quantizer.narrow_range else -last - 1, last)
    rows = weight_rows(layer)
    scale = (quantizer.amax.float() / last).reshape(-1, 1)
    grid = choose_rounding(rows, scale, moments, bounds)
    nearest = (rows / scale).round().clamp(*bounds)
    shape = layer.weight.movedim(quantizer.axis, 0).shape
    weight = (grid * scale).reshape(shape).movedim(0, quantizer.axis)
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype).contiguous(), layer.weight.requires_grad)
    power = moments.power.sum()
    before, after = ((moments.error(points * scale - rows).sum() / power).item() for points in (nearest, grid))
    return before, after


def weight_rows(layer: QuantLayer) -> Tensor:
    """A layer's weights as a float32 matrix (out, K), columns in the order of the inputs that `_columns` gives."""
    return layer.weight.detach().movedim(layer._weight_quantizer.axis, 0).flatten(1).float()


def _collect(name: str, found: dict[str, Moments], layer: QuantLayer, args: tuple, output: Any) -> None:
    """Forward hook in the float network: add one batch to the layer's moments."""
    with quantizer_flags([layer._input_quantizer], _disabled=False):
        columns, values = _columns(layer, args[0], output)
    if layer.bias is not None:
        values = values - layer.bias.float()[:, None]
    one = Moments.of(columns, values, weight_rows(layer))
    found[name] = found[name] + one if name in found else one


def _columns(layer: QuantLayer, x: Tensor | SparseConvTensor, y: Tensor | SparseConvTensor) -> tuple[Tensor, Tensor]:
    """Quantised inputs (K, n) that make up n outputs, and these float outputs (out, n), evenly chosen."""
    if isinstance(layer, QuantSparseConvolution):
        picked = _spread(len(y.indices), y.features.device)
        rows = neighbours(layer, x, y)[:, picked]
        features = layer._input_quantizer(x.features).float()
        taps = torch.where((rows >= 0)[..., None], features[rows], 0.0)  # (taps, n, in)
        return taps.permute(0, 2, 1).flatten(0, 1), y.features[picked].float().T
    if isinstance(layer, QuantLinear):
        columns, values = layer._input_quantizer(x).flatten(0, -2).float().T, y.flatten(0, -2).float().T
    else:
        settings = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
        unfolded = F.unfold(layer._input_quantizer(x).float(), layer.kernel_size, **settings)  # (N, K, L)
        columns, values = unfolded.movedim(1, 0).flatten(1), y.float().flatten(2).movedim(1, 0).flatten(1)
    picked = _spread(columns.shape[1], columns.device)
    return columns[:, picked], values[:, picked]


def _spread(count: int, device: torch.device) -> Tensor:
    """Indices of at most COLUMNS of `count` positions, evenly spread."""
    return torch.arange(min(count, COLUMNS), device=device) * count // max(min(count, COLUMNS), 1)
