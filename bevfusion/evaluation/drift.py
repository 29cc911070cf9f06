"""How far the detections of one model lie from those of another on the same frames; needs no ground truth.

The reference's best boxes are paired with the other model's boxes of the same class, nearest pairs first. What pairs
differ by is averaged with the reference's scores as weights, since most of a set detector's boxes are guesses of hardly
any score. Sums are kept by class and distance, so that the drifts of frames add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bevfusion.errors import InputError

TOP = 200  # boxes of the reference that count
RADIUS = 2.0  # metres between the centres of a pair, at most; nuScenes counts such boxes as found
RANGES = (0.0, 15.0, 30.0, math.inf)  # metres from the LiDAR in bird's-eye view: near, middle, far
SUMS = ("boxes", "matched", "score", "matched_score", "other_score", "overlap")  # summed as they are
DIFFERENCES = ("centre", "size", "yaw", "velocity", "score_change", "score_bias")  # summed times the reference's score


class Boxes(NamedTuple):
    """Detections of one frame, best first.

    Attributes:
        boxes: (M, 7 or 9) float64: x, y, z, length, width, height (m), yaw (rad), and vx, vy (m/s).
        scores: (M,) float64 in 0..1; labels: (M,) int64.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, result: Mapping, top: int = TOP) -> Boxes:
        """The `top` best of a model's result (boxes_3d, scores_3d, labels_3d); what is not finite counts as missing."""
        boxes, scores = (
            np.asarray(tensor.detach().cpu(), np.float64) for tensor in (result["boxes_3d"].tensor, result["scores_3d"])
        )
        finite = np.flatnonzero(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
        best = finite[np.argsort(-scores[finite], kind="stable")[:top]]
        return cls(boxes[best], scores[best], np.asarray(result["labels_3d"].detach().cpu(), np.int64)[best])


def match(reference: Boxes, other: Boxes, radius: float = RADIUS) -> tuple[np.ndarray, np.ndarray]:
    """Pair boxes of one class whose centres lie less than `radius` metres apart in bird's-eye view, nearest first.

    Returns two int64 (P,): rows of the reference, in order, and the row of the other that each is paired with.
    """
    x, y = (reference.boxes[:, None, axis] - other.boxes[None, :, axis] for axis in (0, 1))
    distance = np.hypot(x, y)
    rows, columns = np.nonzero((distance < radius) & (reference.labels[:, None] == other.labels))
    order = np.argsort(distance[rows, columns], kind="stable")
    partner = np.full(len(reference.boxes), -1)
    free = np.ones(len(other.boxes), bool)
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if partner[row] < 0 and free[column]:
            partner[row], free[column] = column, False
    matched = np.flatnonzero(partner >= 0)
    return matched, partner[matched]


def pair_differences(reference: Boxes, other: Boxes) -> dict[str, np.ndarray]:
    """What paired boxes (row by row) differ by, each float64 (P,).

    centre (m, bird's-eye view), size (1 - IoU of the boxes laid on each other), yaw (rad, 0..pi), velocity (m/s; 0
    for boxes without), score_change (absolute) and score_bias (other minus reference).
    """
    a, b = reference.boxes, other.boxes
    common = np.minimum(a[:, 3:6], b[:, 3:6]).prod(axis=1)
    union = a[:, 3:6].prod(axis=1) + b[:, 3:6].prod(axis=1) - common
    turn = np.abs(a[:, 6] - b[:, 6]) % (2 * np.pi)
    change = other.scores - reference.scores
    return {
        "centre": np.linalg.norm(a[:, :2] - b[:, :2], axis=1),
        "size": 1 - np.divide(common, union, out=np.ones_like(common), where=union > 0),
        "yaw": np.minimum(turn, 2 * np.pi - turn),
        "velocity": np.linalg.norm(a[:, 7:9] - b[:, 7:9], axis=1),
        "score_change": np.abs(change),
        "score_bias": change,
    }


@dataclass(frozen=True, eq=False)
class Drift:
    """Sums over the boxes of any number of frames, by class and distance from the LiDAR; drifts add up.

    sums: float64 (classes, ranges, sums), in the order of SUMS and DIFFERENCES.
    """

    sums: np.ndarray

    @classmethod
    def none(cls, classes: int) -> Drift:
        """The drift of no frames."""
        return cls(np.zeros((classes, len(RANGES) - 1, len(SUMS) + len(DIFFERENCES))))

    def __add__(self, other: Drift) -> Drift:
        """The drift over both sets of frames."""
        return Drift(self.sums + other.sums)

    def measures(self) -> dict[str, float | None]:
        """What `summarise` says of all boxes."""
        return summarise(self.sums.sum(axis=(0, 1)))

    def to_dict(self, classes: Sequence[str]) -> dict:
        """All of it for JSON: the measures of all boxes, by class (`by_class`) and by distance (`by_range`)."""
        by_class = {name: summarise(row) for name, row in zip(classes, self.sums.sum(axis=1), strict=True)}
        by_range = dict(zip(range_names(), map(summarise, self.sums.sum(axis=0)), strict=True))
        return {**self.measures(), "by_class": by_class, "by_range": by_range}


def measure_drift(reference: Boxes, other: Boxes, classes: int, radius: float = RADIUS) -> Drift:
    """Drift of one frame.

    Raises:
        InputError: a label is not below `classes`.
    """
    highest = max(side.labels.max(initial=-1) for side in (reference, other))
    if highest >= classes:
        raise InputError(f"the model detects class {highest}, but the data set has {classes}: 0 to {classes - 1}")
    total = Drift.none(classes).sums
    rows, columns = match(reference, other, radius)
    a, b = (Boxes(*(field[chosen] for field in side)) for side, chosen in ((reference, rows), (other, columns)))
    differences = pair_differences(a, b)
    overlap = np.minimum(a.scores, b.scores) * (1 - differences["centre"] / radius)
    _add(total, reference, {"boxes": 1.0, "score": reference.scores})
    _add(total, a, {"matched": 1.0, "matched_score": a.scores, "overlap": overlap})
    _add(total, a, {name: value * a.scores for name, value in differences.items()})
    _add(total, other, {"other_score": other.scores})
    return Drift(total)


def summarise(sums: np.ndarray) -> dict[str, float | None]:
    """Measures from sums (SUMS and DIFFERENCES,); None where there was no box to measure.

    boxes: of the reference; recall: share of them that found a pair; score_recall: the same by score; disagreement:
    1 - |A and B| / |A or B| of the two models' scores, where a pair shares its lower score, less the farther it lies
    apart (0: equal; it counts lost and invented boxes, scores and places); then the mean differences of pairs.
    """
    value = dict(zip((*SUMS, *DIFFERENCES), sums.tolist(), strict=True))
    union = value["score"] + value["other_score"] - value["overlap"]
    return {
        "boxes": int(value["boxes"]),
        "recall": _ratio(value["matched"], value["boxes"]),
        "score_recall": _ratio(value["matched_score"], value["score"]),
        "disagreement": None if union <= 0 else 1 - value["overlap"] / union,
        **{name: _ratio(value[name], value["matched_score"]) for name in DIFFERENCES},
    }


def range_names() -> list[str]:
    """Name of each distance range, such as `0-15 m`."""
    pairs = itertools.pairwise(RANGES)
    return [f"{low:g} m and more" if math.isinf(high) else f"{low:g}-{high:g} m" for low, high in pairs]


def _add(total: np.ndarray, boxes: Boxes, values: Mapping[str, np.ndarray | float]) -> None:
    """Add one value a box to the sums of its class and distance."""
    distance = np.linalg.norm(boxes.boxes[:, :2], axis=1)
    cell = boxes.labels, np.digitize(distance, RANGES[1:-1])
    for name, value in values.items():
        np.add.at(total[..., (*SUMS, *DIFFERENCES).index(name)], cell, value)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
