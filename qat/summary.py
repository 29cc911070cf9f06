"""What a run of `qat/ptq.py` says at its end."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lean.matching import matches
from lean.recipe import Recipe
from lean.sqnr import Measured, Noise
from lean.status import layer_status
from qat import tables


def summary(
    model: nn.Module, recipe: Recipe, floats: Mapping[str, str], measured: Measured | None, made: Mapping[str, Any]
) -> str:
    """Lay out the branches, the layers left in float, and the frames that were replaced.

    Args:
        floats: layer of a quantised branch -> why it computes in floating point.
        measured: noise of branches and maps, None if it was not measured.
        made: what the statistics were made of.
    """
    parts = [branch_table(model, recipe, measured.outputs if measured else {}), float_lines(floats)]
    if made.get("replaced"):
        parts.append(replaced_lines(made["replaced"]))
    return "\n".join(parts)


def branch_table(model: nn.Module, recipe: Recipe, noise: Mapping[str, Noise]) -> str:
    """Lay out per branch its layers in INT8 and in float, the range of their amax, and the SQNR of its output.

    noise: by branch, and by the head's maps; empty if it was not measured.
    """
    rows = []
    for branch in recipe.branches:
        layers = [layer for layer in layer_status(model) if matches(layer.name, [branch.path, f"{branch.path}.*"])]
        active = [layer for layer in layers if not layer.disabled]
        inputs = [layer.input_amax for layer in active]
        weights = [bound for layer in active if layer.weight_amax for bound in layer.weight_amax]
        counts = len(active), len(layers) - len(active)
        rows.append((branch.path, *counts, _range(inputs), _range(weights), _decibels(noise, branch.path)))
    others = noise.keys() - {branch.path for branch in recipe.branches}
    rows += [(name, "-", "-", "-", "-", _decibels(noise, name)) for name in sorted(others)]
    headers = ("branch", "int8 layers", "disabled", "input amax", "weight amax", "output SQNR [dB]")
    return tables.format_table(headers, rows, right=("int8 layers", "disabled", "output SQNR [dB]"))


def float_lines(floats: Mapping[str, str]) -> str:
    """Say which layers of quantised branches stay in floating point, and why."""
    if not floats:
        return "every layer of the quantised branches is in INT8"
    return "\n".join(["left in floating point:", *(f"  {name}: {why}" for name, why in floats.items())])


def replaced_lines(replaced: Mapping[str, str | None]) -> str:
    """Say which frames could not be read, and what ran instead."""
    lines = [
        f"  {old}: replaced by {new}" if new else f"  {old}: left out, no other frame was left"
        for old, new in replaced.items()
    ]
    return "\n".join([f"frames that could not be read: {len(replaced)}", *lines])


def _decibels(noise: Mapping[str, Noise], name: str) -> str:
    return f"{noise[name].sqnr_db:.1f}" if name in noise else "-"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}" if values else "-"
