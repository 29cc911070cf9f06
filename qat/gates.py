"""What a run proves of itself: folding changes nothing, ranges are plausible, the quantised model works on a frame."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bevfusion.data import to_device
from lean.bevfusion_recipe import HEAD_MAPS
from lean.calibrate import model_device, name_some
from lean.errors import QuantizationError
from lean.fold import fold_dense, fold_sparse
from lean.fold_proof import LIMIT, fold_proven
from lean.matching import matches
from lean.outliers import FACTOR, outliers
from lean.recipe import Recipe
from lean.sqnr import Measured, measure_noise, output_module
from qat.frames import Frames, first_readable
from qat.stopping import explained_failures, first_forward

LEAST_SQNR = 10.0  # dB of a branch's output, below which it is a warning
WORST = 3  # layers that such a warning names

logger = logging.getLogger("qat")


@dataclass(frozen=True)
class Sample:
    """A calibration frame on the model's device: arguments of its forward."""

    token: str
    inputs: Mapping[str, Any]


def load_sample(frames: Frames, device: torch.device) -> Sample:
    """Load the first frame of the run, or with `--on-bad-frame skip` the first that can be read.

    Raises:
        InputError: the first frame can't be read, or none can.
    """
    token, batch = first_readable(frames)
    return Sample(token, to_device(batch, device))


def outputs_of(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Branch, or dense map of the head -> name of the module that computes it."""
    modules = dict(model.named_modules())
    branches = {branch.path: output_module(model, branch.path) for branch in recipe.branches}
    return branches | {name: name for name in HEAD_MAPS if name in modules}


def fold(model: nn.Module, recipe: Recipe, sample: Sample | None) -> str:
    """Fold batch normalisations, in place, prove it on `sample` if there is one, and say how far outputs differ.

    Raises:
        InputError: the float network can't compute the frame.
        QuantizationError: folding changes the float network; the layer is named.
    """
    if sample is None:
        pairs = [*fold_sparse(model), *fold_dense(model)]
        return f"folded {len(pairs)} batch normalisations; not compared with the network before, as no frame was run"
    outputs = outputs_of(model, recipe).values()

    def run() -> None:
        with first_forward(f"frame {sample.token}"):
            model(**sample.inputs)

    with explained_failures(lambda: f"frame {sample.token}", model_device(model)):
        proof = fold_proven(model, run, list(outputs))
    most = max(*proof.outputs.values(), *proof.layers.values(), 0.0)
    return f"folded {len(proof.pairs)} batch normalisations: outputs differ by {most:.1e} relative (limit {LIMIT:.0e})"


def check(model: nn.Module, recipe: Recipe, sample: Sample | None) -> Measured | None:
    """Warn of implausible ranges, and run `sample` through the quantised network; None without a sample.

    The noise of outputs is that of branches, by their paths, and of the head's dense maps.

    Raises:
        QuantizationError: the quantised network gives NaN or infinity; the first such part is named.
    """
    paths = [branch.path for branch in recipe.branches]
    for path in paths:
        if found := sorted(map(str, outliers(model, [path]))):
            logger.warning(
                "%s: ranges more than a factor of %g from the median of their branch: %s",
                path,
                FACTOR,
                name_some(found),
            )
    if sample is None:
        return None
    outputs = outputs_of(model, recipe)
    with explained_failures(lambda: f"frame {sample.token}", model_device(model)):
        measured = measure_noise(
            model, [sample], lambda net, one: _refuse_nonfinite(net(**one.inputs)), outputs=list(outputs.values())
        )
    for name, module in outputs.items():
        if not measured.outputs[module].is_finite:
            raise QuantizationError(
                f"the quantised network gives NaN or infinity at {name}, on frame {sample.token}: look for a layer "
                "with an implausible range among the warnings"
            )
        _warn_of_noise(name, measured, module)
    return replace(measured, outputs={name: measured.outputs[module] for name, module in outputs.items()})


def _refuse_nonfinite(results: Sequence[Mapping[str, Any]]) -> None:
    for one in results:
        if not (torch.isfinite(one["boxes_3d"].tensor).all() and torch.isfinite(one["scores_3d"]).all()):
            raise QuantizationError("the network gives boxes or scores that are NaN or infinite")


def _warn_of_noise(name: str, measured: Measured, module: str) -> None:
    sqnr = measured.outputs[module].sqnr_db
    if sqnr >= LEAST_SQNR:
        return
    layers = worst_layers(measured, name) or worst_layers(measured)
    listed = ", ".join(f"{layer} ({noise:.1f} dB)" for layer, noise in layers)
    logger.warning("%s: SQNR of its output is %.1f dB, below %g; its worst layers: %s", name, sqnr, LEAST_SQNR, listed)


def worst_layers(measured: Measured, branch: str = "*", count: int = WORST) -> list[tuple[str, float]]:
    """The layers of a branch with the most noise of their own, the worst first, with their SQNR in dB."""
    found = [(n, noise.sqnr_db) for n, noise in measured.layers["both"].items() if matches(n, [branch, f"{branch}.*"])]
    return sorted(found, key=lambda item: item[1])[:count]
