"""The report on a quantised model in memory: its layers, and what quantisation changes on a few frames."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bevfusion.errors import InputError
from lean.report.charts import charts
from lean.report.rows import layer_rows
from lean.statistics import Statistics
from lean.switches import named_quantizers
from qat import reporting, tables
from qat.findings import measure, report_dataset


def report_model(
    args: argparse.Namespace,
    model: nn.Module,
    cfg: Mapping[str, Any],
    statistics: Statistics | None,
    device: torch.device,
    steps: tables.Steps,
    files: Sequence[str | Path],
    workers: int,
) -> None:
    """Measure a quantised model as `--report-frames` says, and write its report if `--report` asks for one.

    Args:
        files: of the model; the first one's name is the report's title.

    Raises:
        InputError: a frame can't be read.
        QuantizationError: the folder can't be written to.
    """
    if args.report is None:
        return
    without_data = getattr(args, "from_stats", None) is not None
    with steps.step("report"):
        sections = model_sections(model, cfg, statistics, device, args.report_frames, workers, without_data)
    made_of = model.ptq
    settings = {
        "amax of inputs": describe_method(made_of["method"]),
        "amax of weights": made_of["weight_method"],
        "statistics by": made_of["calibrator"],
        "config": args.config,
    }
    run = reporting.run_entry(steps, device, settings)
    entries = [*float_entry(made_of["checkpoint"]), *(reporting.file_entry("int8", path) for path in files)]
    reporting.write_report(args, reporting.report_of(Path(files[0]).stem, run, files=entries, **sections))


def model_sections(
    model: nn.Module,
    cfg: Mapping[str, Any],
    statistics: Statistics | None,
    device: torch.device,
    frames: int,
    workers: int,
    without_data: bool = False,
) -> dict[str, Any]:
    """The sections of a report that describe a quantised model with its attribute `ptq`, measured on `frames` frames.

    Args:
        without_data: leave out, with a note, what needs frames if they can't be read.

    Raises:
        InputError: a frame can't be read.
    """
    made_of, notes, findings = model.ptq, [], None
    branches = [branch["path"] for branch in made_of["recipe"]["branches"]]
    try:
        if frames:
            findings = measure(model, branches, report_dataset(cfg), frames, device, workers)
        else:
            notes.append("SQNR, drift and pictures are missing: no frames were run for the report.")
    except InputError as error:
        if not without_data:
            raise
        notes.append(f"SQNR, drift and pictures are missing: {error}.")
    if statistics is None:
        notes.append("Histograms are missing: no statistics were kept.")
    reasons = {"the recipe disables it": made_of["recipe"]["disable"], "--disable": made_of["disable"]}
    calibration = made_of["calibration"]
    return {
        "calibration": {key: calibration[key] for key in ("pipeline", "seed", "tokens")},
        "layers": layer_rows(model, branches, reasons, findings and findings.noise, findings and findings.macs),
        "quantizers": charts(statistics.histograms, named_quantizers(model)) if statistics else {},
        **(findings.sections() if findings else {}),
        "tables": [mixed_table(made_of["auto"])] if "auto" in made_of else [],
        "notes": notes,
    }


def mixed_table(auto: Mapping[str, Any]) -> dict[str, Any]:
    """What `--auto` found, from the model's record (`qat.auto.Result.to_dict`), as a table of the report."""
    searched, others = auto["frames"]
    rows = [
        [f"{auto['metric']} lost on the {searched} frames searched on (points)", *auto["searched"]],
        [f"{auto['metric']} lost on {others} others (points)", *auto["verified"]],
        ["MACs in INT8, of what can be quantised (%)", *(100 * share for share in auto["share"])],
        ["MACs in INT8, of the whole model (%)", *(100 * share for share in auto["share_of_all"])],
    ]
    outcome = "met" if auto["kept"] else "not met"
    note = (
        f"--auto, at most {auto['target']:g} points of {auto['metric']} lost: {outcome}, after {auto['measurements']} "
        f"measurements. Left in FP16 besides what the recipe says: {', '.join(auto['layers']) or 'nothing'}."
    )
    columns = [{"title": title, "digits": digits} for title, digits in (("", None), ("Before", 2), ("After", 2))]
    return {"id": "mixed", "title": "Mixed precision", "note": note, "columns": columns, "rows": rows}


def float_entry(checkpoint: Mapping[str, str]) -> list[dict[str, Any]]:
    """The checkpoint that a model was made of, unless it is gone or another one by now."""
    if not Path(checkpoint["file"]).is_file():
        return []
    entry = reporting.file_entry("float", checkpoint["file"])
    return [entry] if entry["sha256"] == checkpoint["sha256"] else []


def describe_method(method: str | Mapping[str, str]) -> str:
    """How amax is chosen, in words."""
    rules = {"*": method} if isinstance(method, str) else method
    return ", ".join(one if pattern == "*" else f"{one} in {pattern}" for pattern, one in rules.items())
