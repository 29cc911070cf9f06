"""The sections of a report that a sensitivity analysis fills."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lean.report.rows import branch_of, layer_rows
from qat.findings import drift_section

NOTE = (
    "Each row is a layer, or the layers that share a scale, in INT8 alone, the rest in float, on {frames} frames, the "
    "most sensitive first. Errors of outputs are relative (L2); disagreement is the part of the scored boxes that "
    "differ from the float model's; in the last column all layers are in INT8 but those of the row."
)


def sections(document: Mapping[str, Any], model: nn.Module, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Table, layers with their SQNR, and drift of the model quantised as a whole; see `lean.report.schema`.

    Args:
        document: the result of `qat/sensitivity.py`.
        recipe: of the model, as a mapping.
    """
    branches = [branch["path"] for branch in recipe["branches"]]
    rows = layer_rows(model, branches, {"the recipe disables it": recipe["disable"]})
    sqnr = {name: parts.get("both") for unit in document["units"] for name, parts in unit["sqnr_db"].items()}
    for row in rows:
        row["sqnr"] = sqnr.get(row["name"]) if row["state"] == "int8" else None
    return {
        "layers": rows,
        "measured": list(document["frames"]),
        "drift": drift_section(document["int8"]["drift"], len(document["frames"])),
        "tables": [_table(document, branches)],
    }


def _table(document: Mapping[str, Any], branches: list[str]) -> dict[str, Any]:
    outputs, scored = document["outputs"], document["float"]["scores"] is not None
    texts = ["Layers", "Branch"]
    numbers = [("SQNR (dB)", 1), *((f"{name} (%)", 2) for name in outputs), ("Disagreement (%)", 2)]
    numbers += [("mAP (%)", 2), ("NDS (%)", 2)] if scored else []
    columns = [{"title": title, "digits": None} for title in texts]
    columns += [{"title": title, "digits": digits} for title, digits in [*numbers, ("Without it (%)", 2)]]
    rows = []
    for unit in document["units"]:
        known = [value for parts in unit["sqnr_db"].values() if (value := parts.get("both")) is not None]
        without = unit["without"] and unit["without"]["drift"]["disagreement"]
        cells = [min(known, default=None), *_values(unit["alone"], outputs, scored), _percent(without)]
        rows.append([", ".join(unit["layers"]), branch_of(unit["name"], branches), *cells])
    rows.append(["all quantised", "", None, *_values(document["int8"], outputs, scored), None])
    note = NOTE.format(frames=len(document["frames"]))
    return {"id": "sensitivity", "title": "Sensitivity", "note": note, "columns": columns, "rows": rows}


def _values(side: Mapping[str, Any], outputs: list[str], scored: bool) -> list[float | None]:
    values = [*(side["errors"][name] for name in outputs), side["drift"]["disagreement"]]
    return [_percent(value) for value in [*values, *(side["scores"].values() if scored else ())]]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
