"""Proves on one batch that folding batch normalisations leaves the float network as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lean.calibrate import evaluating
from lean.errors import QuantizationError
from lean.fold import Pair, fold_dense, fold_sparse, foldable
from lean.sqnr import noise_between, tensors_of
from lean.switches import disable_quantization

LIMIT = 1e-4  # relative L2 difference


@dataclass(frozen=True)
class FoldProof:
    """What folding changed.

    Attributes:
        pairs: what was folded.
        outputs: module -> relative L2 difference of its output.
        layers: convolution -> relative difference of its output channels' means and root mean squares.
    """

    pairs: list[Pair]
    outputs: dict[str, float]
    layers: dict[str, float]


def fold_proven(
    model: nn.Module, run: Callable[[], Any], outputs: Sequence[str] = (), limit: float = LIMIT
) -> FoldProof:
    """Fold every batch normalisation, in place, and compare the float network before and after on one batch.

    Layers are compared by two numbers a channel, which don't depend on the order of a sparse tensor's rows, and keep
    memory bounded; the outputs by all their values.

    Args:
        run: runs the batch through `model`; called twice.
        outputs: names of modules whose outputs are compared.

    Raises:
        QuantizationError: an output or a layer differs by more than `limit`; the first such layer in forward order is
            named. The model is folded then, too.
    """
    pairs = foldable(model)
    conv_of = {pair.norm: pair.conv for pair in pairs}
    before, kept = _run(model, run, list(conv_of), outputs)
    for name, tensors in kept.items():
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise QuantizationError(f"the float network gives NaN or infinity at {name}: check checkpoint and frame")
    fold_sparse(model)
    fold_dense(model)
    after, found = _run(model, run, list(conv_of.values()), outputs)
    layers = {conv_of[norm]: _difference(tensors, after.get(conv_of[norm], [])) for norm, tensors in before.items()}
    proof = FoldProof(pairs, {name: _difference(tensors, found[name]) for name, tensors in kept.items()}, layers)
    _refuse(proof, limit)
    return proof


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Relative L2 difference; infinite where there is another number of tensors than before."""
    return noise_between(before, after).relative if len(before) == len(after) else math.inf


def _refuse(proof: FoldProof, limit: float) -> None:
    layers = [f"{name} ({value:.1e})" for name, value in proof.layers.items() if not value < limit]
    outputs = [f"{name} ({value:.1e})" for name, value in proof.outputs.items() if not value < limit]
    if layers or outputs:
        place = f"first at {layers[0]}" if layers else f"at {outputs[0]}, though no folded layer differs on its own"
        raise QuantizationError(
            f"folding batch normalisations changes the float network by more than {limit:.0e} relative, {place}: "
            "is the normalisation after that convolution a plain one, and is the convolution's output used twice?"
        )


def _run(
    model: nn.Module, run: Callable[[], Any], layers: Sequence[str], outputs: Sequence[str]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Moments of the outputs of `layers`, in forward order, and copies of all `outputs`, in the float network."""
    moments: dict[str, list[Tensor]] = {}
    kept: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for context in (torch.no_grad(), evaluating(model), disable_quantization(model)):
            stack.enter_context(context)
        stack.enter_context(_hooked(model, layers, moments, _moments))
        stack.enter_context(_hooked(model, outputs, kept, Tensor.clone))
        run()
    return moments, kept


@contextmanager
def _hooked(
    model: nn.Module, names: Sequence[str], into: dict[str, list[Tensor]], keep: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Add what `keep` makes of the named modules' outputs to their lists."""
    with ExitStack() as stack:
        for name in names:

            def hook(_: nn.Module, inputs: tuple, output: Any, name: str = name) -> None:
                into.setdefault(name, []).extend(keep(tensor) for tensor in tensors_of(output))

            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _moments(output: Tensor) -> Tensor:
    """Mean and root mean square of each channel, (2, C) float64, of (N, C, ...) values; zeros if there are none."""
    rows = output.transpose(0, 1).flatten(1)
    if rows.shape[1] == 0:
        return rows.new_zeros(2, len(rows), dtype=torch.float64)
    squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) / rows.shape[1] ** 0.5
    return torch.stack([rows.mean(dim=1, dtype=torch.float64), squares])
