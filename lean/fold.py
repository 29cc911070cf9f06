"""Folds batch normalisations into the convolutions before them.

Pairs are found where the forward order is known: neighbours in a Sequential, mmcv's ConvModule, and residual blocks
(`conv1` and its norm, and so on), never by the order in which a module happens to list its children.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from spconv.pytorch import SparseSequential
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor, nn

from lean.errors import QuantizationError
from lean.layers import QuantLayer
from lean.layers.sparse import output_axis
from lean.walker import replace_modules

DENSE = (nn.Conv2d, nn.ConvTranspose2d)
DENSE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
SPARSE = (SparseConvolution,)
SPARSE_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)


class Pair(NamedTuple):
    """Dotted names of a convolution and of the batch normalisation that reads its output and nothing else."""

    conv: str
    norm: str


def fold_dense(model: nn.Module) -> list[Pair]:
    """Fold every BatchNorm2d that follows a (transposed) 2D convolution, in place; return the pairs."""
    return _fold(model, DENSE, DENSE_NORMS)


def fold_sparse(backbone: nn.Module) -> list[Pair]:
    """Fold every BatchNorm1d that follows a sparse convolution, in place; return the pairs."""
    return _fold(backbone, SPARSE, SPARSE_NORMS)


def foldable(model: nn.Module) -> list[Pair]:
    """Return the pairs that `fold_sparse` and `fold_dense` would fold."""
    return [*_pairs(model, SPARSE, SPARSE_NORMS), *_pairs(model, DENSE, DENSE_NORMS)]


def fold_pair(conv: nn.Module, norm: nn.Module) -> None:
    """Fold `norm` (evaluation mode: running statistics) into `conv`, giving it new parameters.

    Computes in float64. A transposed convolution's output channels lie on dim 1 of its weight, within each group.

    Raises:
        QuantizationError: the channels differ, `norm` has no running statistics, or `conv` is calibrated already.
    """
    if norm.running_var is None:
        raise QuantizationError("the batch normalisation has no running statistics: it can't be folded")
    if norm.num_features != conv.out_channels:
        raise QuantizationError(f"{conv.out_channels} output channels, but {norm.num_features} are normalised")
    if isinstance(conv, QuantLayer) and any(quantizer.amax is not None for quantizer in conv.quantizers):
        raise QuantizationError("the convolution is calibrated already: fold before calibration")
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = 0 if conv.bias is None else conv.bias.double()
    bias = (bias - norm.running_mean.double()) * scale + (0 if norm.bias is None else norm.bias.double())
    weight = conv.weight.double() * _along_outputs(scale, conv)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype).detach(), conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype).detach(), conv.weight.requires_grad)


def _along_outputs(scale: Tensor, conv: nn.Module) -> Tensor:
    """Shape `scale` (out_channels,) so that it multiplies the weight of `conv` by output channel."""
    shape = conv.weight.shape
    if isinstance(conv, nn.ConvTranspose2d):
        per_group = scale.view(conv.groups, 1, -1)
        by_input = per_group.expand(-1, shape[0] // conv.groups, -1)
        return by_input.reshape(shape[0], shape[1], 1, 1)
    axis = 0
    if isinstance(conv, SparseConvolution):
        axis = output_axis(shape, conv.kernel_size, conv.in_channels, conv.out_channels)
    return scale.view([-1 if dim == axis else 1 for dim in range(len(shape))])


def _fold(model: nn.Module, convs: tuple, norms: tuple) -> list[Pair]:
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = _pairs(model, convs, norms)
    places = Counter(modules.values())
    for pair in pairs:
        for name in pair:
            if places[modules[name]] > 1:
                raise QuantizationError(
                    f"{name} is used in several places: {pair.norm} can't be folded into {pair.conv}"
                )
        try:
            fold_pair(modules[pair.conv], modules[pair.norm])
        except QuantizationError as error:
            raise QuantizationError(f"folding {pair.norm} into {pair.conv}: {error}") from None
    folded = {pair.norm for pair in pairs}
    replace_modules(model, lambda name, _: nn.Identity() if name in folded else None)
    return pairs


def _pairs(model: nn.Module, convs: tuple, norms: tuple) -> list[Pair]:
    return [
        Pair(*(f"{parent}.{child}".lstrip(".") for child in pair))
        for parent, module in model.named_modules(remove_duplicate=False)
        for pair in _pairs_in(module)
        if isinstance(getattr(module, pair[0]), convs) and isinstance(getattr(module, pair[1]), norms)
    ]


def _pairs_in(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of children of which the second reads just the output of the first."""
    children = list(module._modules)
    if isinstance(module, nn.Sequential | SparseSequential):
        yield from itertools.pairwise(children)
    elif hasattr(module, "norm_name") and hasattr(module, "order"):
        order = list(module.order)
        if module.with_norm and order.index("norm") == order.index("conv") + 1:
            yield "conv", module.norm_name
    else:
        for child in children:
            if number := re.fullmatch(r"conv(\d+)", child):
                norm = getattr(module, f"norm{number[1]}_name", f"bn{number[1]}")
                if norm in module._modules:
                    yield child, norm
