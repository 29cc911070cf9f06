"""Scores of one or two models as text tables."""

import math
from collections.abc import Mapping

from prettytable import PrettyTable

from bevfusion.evaluation.metrics import DetectionScores

ERRORS = {
    "trans_err": "mATE [m]",
    "scale_err": "mASE [1-IoU]",
    "orient_err": "mAOE [rad]",
    "vel_err": "mAVE [m/s]",
    "attr_err": "mAAE [1-acc]",
}


def summary_table(scores: Mapping[str, DetectionScores]) -> str:
    """mAP, NDS and the five true-positive errors; a column a model, and the difference if there are two."""
    table = _table(["metric", *scores], scores)
    models = list(scores.values())
    _add_row(table, "mAP [%]", [100 * model.mean_ap for model in models], 2)
    _add_row(table, "NDS [%]", [100 * model.nds for model in models], 2)
    for error, title in ERRORS.items():
        _add_row(table, title, [model.tp_errors[error] for model in models], 3)
    return str(table)


def class_table(scores: Mapping[str, DetectionScores]) -> str:
    """AP and ground-truth boxes by class; for one model also the true-positive errors, for two the difference."""
    models = list(scores.values())
    single = len(models) == 1
    columns = [title[1:4] for title in ERRORS.values()] if single else []
    titles = ["AP [%]"] if single else [f"AP {name} [%]" for name in scores]
    table = _table(["class", "boxes", *titles], scores, columns)
    for name, count in models[0].truth_counts.items():
        errors = [_number(models[0].class_tp_errors[name][error], 3) for error in ERRORS] if single else []
        _add_row(table, name, [100 * model.class_aps[name] for model in models], 2, [count], errors)
    return str(table)


def _table(columns: list[str], scores: Mapping, extra: list[str] | None = None) -> PrettyTable:
    table = PrettyTable([*columns, *(["difference"] if len(scores) == 2 else []), *(extra or [])], align="r")
    table.align[columns[0]] = "l"
    return table


def _add_row(table: PrettyTable, title: str, values: list[float], digits: int, before=(), after=()) -> None:
    change = [f"{values[1] - values[0]:+.{digits}f}"] if len(values) == 2 else []
    table.add_row([title, *before, *(_number(value, digits) for value in values), *change, *after])


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
