"""The layers of a model as rows of a report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lean.layers import why_float
from lean.layers.convert import BYPASSED
from lean.matching import matches
from lean.sqnr import Noise
from lean.status import LayerStatus, layer_status
from lean.switches import named_quantizers, quantized_layers, unwrap

MOST_SQNR = 200.0  # dB that stand for no error at all


def layer_rows(
    model: nn.Module,
    branches: Sequence[str],
    reasons: Mapping[str, Sequence[str]],
    noise: Mapping[str, Noise] | None = None,
    macs: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Every layer that is quantised, multiplies or has a kernel, in module order: see LAYER in the schema.

    Args:
        branches: paths of the branches that are quantised.
        reasons: why layers are disabled -> globs of such layers, the first fitting counts.
        noise: of each layer's output. macs: multiply-accumulates of each layer in a frame.
    """
    model, noise, macs = unwrap(model), noise or {}, macs or {}
    status = {row.name: row for row in layer_status(model)}
    names = {quantizer: name for name, quantizer in named_quantizers(model).items()}
    layers, rows = quantized_layers(model), []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if name in layers:
            rows.append(_quantised(status[name], layers[name], names[layers[name]._input_quantizer], reasons))
        elif name in macs or (weight is not None and weight.dim() >= 2 and not isinstance(module, BYPASSED)):
            rows.append(_float(name, module, branches))
        else:
            continue
        rows[-1] |= {
            "branch": branch_of(name, branches),
            "shape": _shape(weight),
            "sqnr": decibels(noise.get(name)),
            "macs": macs.get(name),
        }
    return rows


def branch_of(name: str, branches: Sequence[str]) -> str:
    """The branch that a layer belongs to, or the first word of its name."""
    return next((path for path in branches if matches(name, [path, f"{path}.*"])), name.partition(".")[0])


def decibels(noise: Noise | None) -> float | None:
    """SQNR in dB, between -200 and 200; None if it was not measured or is not a number."""
    if noise is None or math.isnan(noise.sqnr_db):
        return None
    return min(max(noise.sqnr_db, -MOST_SQNR), MOST_SQNR)


def _quantised(row: LayerStatus, layer: nn.Module, quantizer: str, reasons: Mapping[str, Sequence[str]]) -> dict:
    why = next((why for why, patterns in reasons.items() if matches(row.name, patterns)), "its quantizers are off")
    return {
        "name": row.name,
        "kind": row.kind,
        "bits": layer._input_quantizer.num_bits,
        "state": "disabled" if row.disabled else "int8",
        "why": why if row.disabled else "",
        "shared_with": list(row.shared_with),
        "quantizer": quantizer,
        "amax": row.input_amax,
        "weight_amax": None if row.weight_amax is None else list(row.weight_amax),
    }


def _float(name: str, module: nn.Module, branches: Sequence[str]) -> dict[str, Any]:
    inside = any(matches(name, [f"{path}.*"]) for path in branches)
    covered = "the recipe leaves it in float" if inside else "the recipe quantises no layer of this part"
    return {
        "name": name,
        "kind": type(module).__name__,
        "bits": None,
        "state": "float",
        "why": why_float(module) or covered,
        "shared_with": [],
        "quantizer": None,
        "amax": None,
        "weight_amax": None,
    }


def _shape(weight: Tensor | None) -> list[int] | None:
    return None if weight is None else list(weight.shape)
