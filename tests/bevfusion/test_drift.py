"""Label-free comparison of two models' detections."""

import json
import math

import numpy as np
import pytest

from bevfusion.errors import InputError
from bevfusion.evaluation.drift import Boxes, Drift, match, measure_drift, pair_differences, range_names
from tests.bevfusion.detections import detections


def box(x: float, y: float = 0.0, yaw: float = 0.0, size=(4.0, 2.0, 1.5), velocity=(0.0, 0.0)) -> list[float]:
    return [x, y, 0.0, *size, yaw, *velocity]


def frame(*rows: list[float], labels=None, scores=None) -> Boxes:
    """Detections in the order given."""
    count = len(rows)
    labels = np.zeros(count, np.int64) if labels is None else np.array(labels)
    scores = np.ones(count) if scores is None else np.array(scores, np.float64)
    return Boxes(np.array(rows, np.float64).reshape(count, 9), scores, labels)


def crowd(seed: int, count: int = 200) -> Boxes:
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        [rng.uniform(-50, 50, (count, 2)), rng.uniform(1, 5, (count, 4)), rng.normal(size=(count, 3))], 1
    )
    return Boxes(boxes, rng.uniform(0, 1, count), rng.integers(0, 10, count))


def test_equal_detections_have_no_drift():
    measures = measure_drift(crowd(0), crowd(0), 10).measures()
    assert measures.pop("boxes") == 200
    assert measures.pop("recall") == measures.pop("score_recall") == 1
    assert set(measures) == {"disagreement", "centre", "size", "yaw", "velocity", "score_change", "score_bias"}
    assert all(value == pytest.approx(0, abs=1e-12) for value in measures.values())


def test_order_of_boxes_does_not_matter():
    one, other = crowd(0), crowd(1)
    shuffled = Boxes(*(field[::-1] for field in other))
    np.testing.assert_allclose(measure_drift(one, other, 10).sums, measure_drift(one, shuffled, 10).sums)


def test_pairs_are_of_one_class_within_reach_and_nearest_first():
    reference = frame(box(0), box(1), box(20), box(40), labels=[0, 0, 0, 1])
    other = frame(box(0.8), box(22.5), box(40), box(-1.5), labels=[0, 0, 0, 0])
    rows, columns = match(reference, other)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 3), (1, 0)]  # 0.8 goes to 1, not to 0


def test_no_box_is_paired_twice():
    rows, columns = match(frame(box(0), box(0.1)), frame(box(0.05)))
    assert (rows.tolist(), columns.tolist()) == ([0], [0])


def test_differences_of_a_pair():
    one = frame(box(0, 0, math.pi - 0.1, (4, 2, 1), (1, 0)), scores=[0.8])
    other = frame(box(0.3, 0.4, -math.pi + 0.1, (2, 2, 1), (1, 2)), scores=[0.5])
    found = {name: value[0] for name, value in pair_differences(one, other).items()}
    wanted = {"centre": 0.5, "size": 0.5, "yaw": 0.2, "velocity": 2, "score_change": 0.3, "score_bias": -0.3}
    assert found == pytest.approx(wanted)


def test_means_are_weighted_with_the_references_scores():
    reference = frame(box(0), box(10), scores=[0.9, 0.1])
    other = frame(box(1), box(10), scores=[0.9, 0.1])
    assert measure_drift(reference, other, 1).measures()["centre"] == pytest.approx(0.9)


def test_lost_boxes_lower_recall_and_invented_ones_only_disagreement():
    reference = frame(box(0), box(10), scores=[0.75, 0.25])
    lost = measure_drift(reference, frame(box(0), scores=[0.75]), 1).measures()
    assert (lost["recall"], lost["score_recall"]) == (0.5, 0.75)
    assert lost["disagreement"] == pytest.approx(0.25)
    invented = measure_drift(reference, frame(box(0), box(10), box(30), scores=[0.75, 0.25, 1.0]), 1).measures()
    assert (invented["recall"], invented["disagreement"]) == (1, pytest.approx(0.5))


def test_disagreement_sees_scores_and_places():
    reference = frame(box(0))
    assert measure_drift(reference, frame(box(0), scores=[0.6]), 1).measures()["disagreement"] == pytest.approx(0.4)
    assert measure_drift(reference, frame(box(1)), 1).measures()["disagreement"] == pytest.approx(1 - 0.5 / 1.5)


def test_by_class_and_by_range():
    reference = frame(box(3), box(20), box(0, 49), labels=[0, 1, 1])
    other = frame(box(3), box(20.5), box(0, 45), labels=[0, 1, 1])
    found = measure_drift(reference, other, 3).to_dict(["car", "bus", "cone"])
    assert [found["by_class"][name]["recall"] for name in ("car", "bus", "cone")] == [1, 0.5, None]
    assert [found["by_range"][name]["recall"] for name in range_names()] == [1, 1, 0]
    assert found["by_range"]["15-30 m"]["centre"] == pytest.approx(0.5)
    assert range_names() == ["0-15 m", "15-30 m", "30 m and more"]
    json.dumps(found, allow_nan=False)


def test_drifts_of_frames_add_up():
    frames = [(crowd(0, 50), crowd(1, 50)), (crowd(2, 80), crowd(3, 70))]
    total = sum((measure_drift(a, b, 10) for a, b in frames), Drift.none(10))
    assert total.measures()["boxes"] == 130
    parts = [measure_drift(a, b, 10).measures() for a, b in frames]
    matched = [part["recall"] * part["boxes"] for part in parts]
    assert total.measures()["recall"] == pytest.approx(sum(matched) / 130)


def test_no_boxes_on_either_side():
    assert measure_drift(frame(), frame(), 1).measures()["recall"] is None
    assert measure_drift(frame(), frame(box(0)), 1).measures()["disagreement"] == 1
    assert measure_drift(frame(box(0)), frame(), 1).measures()["recall"] == 0


def test_the_best_boxes_of_a_result_are_taken_and_broken_ones_left_out():
    boxes = np.array([box(0), box(1), box(np.nan), box(3)])
    found = Boxes.of(detections(boxes, [0, 1, 2, 3], np.float32([0.2, 0.9, 1.0, 0.5])), top=2)
    assert found.labels.tolist() == [1, 3]
    assert found.boxes[:, 0].tolist() == [1, 3]


def test_a_class_without_name_is_refused():
    with pytest.raises(InputError, match="class 4, but the data set has 3"):
        measure_drift(frame(box(0), labels=[4]), frame(box(0), labels=[0]), 3)
