"""From the rows of a sensitivity analysis to its result: what each unit costs, the most sensitive first."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from bevfusion.evaluation import Boxes, Drift, measure_drift, score_submission, to_submission
from lean.sensitivity import ALONE, FLOAT, INT8, WITHOUT, Trial, Unit, plan_trials
from lean.sqnr import PARTS, Noise
from lean.switches import quantized_layers
from qat import tables
from qat.journal import Journal
from qat.trials import LAYERS, Experiment, decode, row_key

Score = Callable[[Sequence[Mapping]], dict[str, float]]
DRIFTS = (
    *("recall", "score_recall", "disagreement", "centre", "size", "yaw", "velocity"),
    *("score_change", "score_bias"),
)
SCORES = ("mAP", "NDS")


def rank(journal: Journal, experiment: Experiment, metric: str, score: Score | None = None) -> dict[str, Any]:
    """The result as docs/sensitivity.md describes it, without what says how it was made.

    Args:
        metric: what the units are sorted by: `drift`, or with `score` `mAP` or `NDS`.
        score: gives `mAP` and `NDS` of one result a frame.
    """
    trials = plan_trials(experiment.units)
    reference = [Boxes.of(decode(row["boxes"])) for row in _rows(journal, experiment, Trial(FLOAT))]
    found = {}
    for trial in tqdm(trials, "compare", unit="trial", disable=None):
        rows = _rows(journal, experiment, trial)
        results = [decode(row["boxes"]) for row in rows]
        found[trial] = {
            "errors": _errors([row["noise"] for row in rows]),
            "drift": _drift(reference, results, experiment.dataset.CLASSES),
            "scores": score(results) if score else None,
        }
    layers = _sum_noise(_rows(journal, experiment, LAYERS))
    units = [_unit(unit, experiment, layers, found) for unit in experiment.units]
    units.sort(key=lambda unit: _sensitivity(unit["alone"], found[Trial(FLOAT)], metric), reverse=True)
    return {"float": {"scores": found[Trial(FLOAT)]["scores"]}, "int8": found[Trial(INT8)], "units": units}


def official_score(experiment: Experiment, nuscenes: Any) -> Score:
    """Scores by nuScenes' own evaluation over the frames of an experiment."""
    dataset = experiment.dataset
    frames = [dataset.data_infos[index] for index in experiment.indices]

    def score(results: Sequence[Mapping]) -> dict[str, float]:
        submission = to_submission(results, frames, dataset.CLASSES, dataset.modality)
        scores = score_submission(submission, nuscenes, experiment.tokens)
        return {"mAP": _short(scores.mean_ap), "NDS": _short(scores.nds)}

    return score


def table(document: Mapping[str, Any], top: int | None = None) -> str:
    """The units as text, at most `top`, and below them the network with all of them quantised."""
    outputs, scored = document["outputs"], document["float"]["scores"] is not None
    titles = [f"{name} %" for name in (*outputs, "drift")] + ["recall %"] + (["mAP %", "NDS %"] if scored else [])
    headers = ["layers", "SQNR dB", *titles, "without: drift %"]
    rows = []
    for unit in document["units"][:top]:
        more = f" +{len(unit['layers']) - 1}" if len(unit["layers"]) > 1 else ""
        note = " (float)" if unit["left_float"] else ""
        without = "-" if unit["without"] is None else _percent(unit["without"]["drift"]["disagreement"])
        rows.append(
            [unit["name"] + more + note, _least(unit, "both"), *_cells(unit["alone"], outputs, scored), without]
        )
    rows.append(["all quantised", "", *_cells(document["int8"], outputs, scored), ""])
    return tables.format_table(headers, rows, right=headers[1:])


def to_csv(document: Mapping[str, Any]) -> str:
    """The units as a flat table: fractions, not per cent; empty where there is no value."""
    outputs = document["outputs"]
    measures = [f"error_{name}" for name in outputs] + [*DRIFTS, *SCORES]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sides = [f"{kind}_{measure}" for kind in (ALONE, WITHOUT) for measure in measures]
    writer.writerow(["name", "layers", "kinds", "left_float", *(f"sqnr_{part}_db" for part in PARTS), *sides])
    for unit in document["units"]:
        head = [unit["name"], " ".join(unit["layers"]), " ".join(unit["kinds"]), int(unit["left_float"])]
        values = [value for kind in (ALONE, WITHOUT) for value in _flat(unit[kind], outputs)]
        writer.writerow([*head, *(_least(unit, part) for part in PARTS), *values])
    return text.getvalue()


def _rows(journal: Journal, experiment: Experiment, trial: Trial | str) -> list[Any]:
    return [journal.rows[row_key(token, trial)] for token in experiment.tokens]


def _unit(unit: Unit, experiment: Experiment, layers: Mapping, found: Mapping[Trial, dict]) -> dict[str, Any]:
    every = quantized_layers(experiment.model)
    sqnr = {
        layer: {part: _finite(layers[part][layer].sqnr_db) for part in PARTS if layer in layers[part]}
        for layer in unit.layers
    }
    return {
        "name": unit.name,
        "layers": list(unit.layers),
        "kinds": [type(every[layer]).__name__ for layer in unit.layers],
        "left_float": unit.left_float,
        "sqnr_db": sqnr,
        ALONE: found[Trial(ALONE, unit.name)],
        WITHOUT: found.get(Trial(WITHOUT, unit.name)),
    }


def _sum_noise(rows: Sequence[Mapping]) -> dict[str, dict[str, Noise]]:
    """Noise of each layer by part, over all frames."""
    return {
        part: {layer: sum((Noise(*row[part][layer]) for row in rows), Noise()) for layer in rows[0][part]}
        for part in rows[0]
    }


def _errors(noises: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float | None]:
    """Relative error of each output over all frames."""
    return {name: _finite(sum((Noise(*row[name]) for row in noises), Noise()).relative) for name in noises[0]}


def _drift(reference: Sequence[Boxes], results: Sequence[Mapping], classes: Sequence[str]) -> dict[str, Any]:
    pairs = zip(reference, map(Boxes.of, results), strict=True)
    total = sum((measure_drift(a, b, len(classes)) for a, b in pairs), Drift.none(len(classes)))
    return _rounded(total.to_dict(classes))


def _sensitivity(alone: Mapping[str, Any], plain: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """How much a unit costs alone; what disagrees most comes first among equals."""
    disagreement = alone["drift"]["disagreement"] or 0.0
    lost = 0.0 if metric == "drift" else plain["scores"][metric] - alone["scores"][metric]
    return lost, disagreement


def _cells(side: Mapping[str, Any], outputs: Sequence[str], scored: bool) -> list[str]:
    values = [*(side["errors"][name] for name in outputs), side["drift"]["disagreement"], side["drift"]["recall"]]
    values += [side["scores"][name] for name in SCORES] if scored else []
    return [_percent(value) for value in values]


def _flat(side: Mapping[str, Any] | None, outputs: Sequence[str]) -> list[float | None]:
    if side is None:
        return [None] * (len(outputs) + len(DRIFTS) + len(SCORES))
    scores = side["scores"] or {}
    values = [side["errors"][name] for name in outputs] + [side["drift"][name] for name in DRIFTS]
    return values + [scores.get(name) for name in SCORES]


def _least(unit: Mapping[str, Any], part: str) -> str:
    """The least SQNR of a unit's layers in dB; nothing if no layer changes."""
    values = [value for layer in unit["sqnr_db"].values() if (value := layer.get(part)) is not None]
    return f"{min(values):.1f}" if values else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _finite(value: float) -> float | None:
    return _short(value) if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float:
    """Six significant digits: a file for people to read."""
    return float(f"{value:.6g}")
