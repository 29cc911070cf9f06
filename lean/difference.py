"""What differs between two saved quantised models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lean.artifact import Artifact
from lean.statistics import differences

SUFFIX = "._amax"


def compare(first: Artifact, second: Artifact) -> dict[str, Any]:
    """Lay out, in plain types, in what two artifacts differ.

    Returns:
        `made_of`: [key, first, second] of config, checkpoint, recipe, method, versions; `frames`: see
        `compare_frames`; `layers`: [layer, property, first, second]; `amax`: see `compare_amax`; `tensors`: see
        `compare_tensors`.
    """
    return {
        "made_of": [list(found) for found in differences(_without_frames(first), _without_frames(second))],
        "frames": compare_frames(_tokens(first), _tokens(second)),
        "layers": [list(found) for found in compare_layers(first, second)],
        "amax": compare_amax(amax_of(first), amax_of(second)),
        "tensors": compare_tensors(_others(first), _others(second)),
    }


def is_empty(difference: Mapping[str, Any]) -> bool:
    """Whether `compare` found nothing."""
    frames, amax, tensors = (difference[key] for key in ("frames", "amax", "tensors"))
    return not any([*map(difference.get, ("made_of", "layers")), not frames["same"], amax["changed"]]) and not any(
        tensors[key] for key in ("changed", "only_first", "only_second")
    )


def compare_frames(first: list[str], second: list[str]) -> dict[str, Any]:
    """Numbers of calibration frames of each, of common ones, and whether they are the same in the same order."""
    common = len(set(first) & set(second))
    return {"first": len(first), "second": len(second), "common": common, "same": first == second}


def compare_layers(first: Artifact, second: Artifact) -> list[tuple[str, str, str, str]]:
    """(layer, property, value in the first, in the second) of every property that differs."""
    rows, others = layer_properties(first), layer_properties(second)
    found = []
    for name in [*rows, *(name for name in others if name not in rows)]:
        found += [(name, *change) for change in differences(rows.get(name, {}), others.get(name, {}))]
    return found


def layer_properties(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Kind, state, bits, axis and sharing of every quantised layer, by its name."""
    quantizers = {state.name: state for state in artifact.structure.quantizers}
    readers: dict[str, list[str]] = {}
    for layer in artifact.structure.layers:
        readers.setdefault(layer.input, []).append(layer.name)
    rows = {}
    for layer in artifact.structure.layers:
        used = [quantizers[name] for name in (layer.input, layer.weight) if name]
        row = {"kind": layer.kind, "state": "float" if all(state.disabled for state in used) else "int"}
        row |= {"input bits": used[0].num_bits, "shares input scale with": _but(readers[layer.input], layer.name)}
        if layer.weight:
            row |= {"weight bits": used[1].num_bits, "weight axis": used[1].axis}
        if layer.activation != "none":
            row["fused activation"] = layer.activation
        rows[layer.name] = row
    return rows


def amax_of(artifact: Artifact) -> dict[str, Tensor]:
    """amax by quantizer."""
    return {name.removesuffix(SUFFIX): t for name, t in artifact.tensors.items() if name.endswith(SUFFIX)}


def compare_amax(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Any]:
    """Number of equal ones, and of each changed one the range in each and the ratio second / first, largest first.

    Of several channels, the ratio is that which is farthest from 1.
    """
    names = [name for name in first if name in second]
    changed = []
    for name in names:
        a, b = first[name].double().flatten(), second[name].double().flatten()
        if torch.equal(a, b):
            continue
        ratios = (b / a).tolist() if a.shape == b.shape else [math.nan]
        changed.append((name, _range(a), _range(b), max(ratios, key=_distance)))
    changed.sort(key=lambda row: -_distance(row[-1]))
    return {"equal": len(names) - len(changed), "changed": [list(row) for row in changed]}


def compare_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Any]:
    """Number of equal tensors, names that only one side has, and [name, relative L2 difference], largest first."""
    names = [name for name in first if name in second]
    changed = [[name, _relative(first[name], second[name])] for name in names]
    changed = sorted((row for row in changed if row[1] != 0), key=lambda row: -row[1])
    return {
        "equal": len(names) - len(changed),
        "changed": changed,
        "only_first": [name for name in first if name not in second],
        "only_second": [name for name in second if name not in first],
    }


def _without_frames(artifact: Artifact) -> dict[str, Any]:
    calibration = artifact.made_of.get("calibration", {})
    return {**artifact.made_of, "calibration": {k: v for k, v in calibration.items() if k not in ("tokens", "sha256")}}


def _tokens(artifact: Artifact) -> list[str]:
    return artifact.made_of.get("calibration", {}).get("tokens", [])


def _others(artifact: Artifact) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in artifact.tensors.items() if not name.endswith(SUFFIX)}


def _but(names: list[str], own: str) -> str:
    return ", ".join(name for name in names if name != own) or "-"


def _range(values: Tensor) -> list[float]:
    return [values.min().item(), values.max().item()]


def _distance(ratio: float) -> float:
    """How far a ratio is from 1: infinite if it is no positive number."""
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _relative(a: Tensor, b: Tensor) -> float:
    """L2 norm of the difference over that of `a`; infinite for other shapes."""
    if a.shape != b.shape:
        return math.inf
    if torch.equal(a, b):
        return 0.0
    size = a.double().norm().item()
    return (b.double() - a.double()).norm().item() / size if size else math.inf
