"""Submission format against the reference, and scores against the devkit's own run."""

import dataclasses
import json
import math

import numpy as np
import pytest
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval

from bevfusion.boxes import legacy_to_lidar
from bevfusion.create_data import create_data
from bevfusion.data.infos import load_infos
from bevfusion.errors import InputError
from bevfusion.evaluation import (
    class_table,
    load_submission,
    save_submission,
    score_submission,
    summary_table,
    to_submission,
)
from bevfusion.nuscenes_tables import open_nuscenes
from tests.bevfusion import tiny_nuscenes as tiny
from tests.bevfusion.detections import CLASSES, detections, perfect


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tiny.TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(folder, "v1.0-mini", database=False)
    return folder


@pytest.fixture(scope="module")
def nuscenes(root):
    return open_nuscenes(root, "v1.0-mini")


@pytest.fixture(scope="module")
def frames(root):
    return load_infos(root / "nuscenes_infos_val.pkl")[0]


@pytest.fixture(scope="module")
def noisy(frames):
    """A submission with good, displaced, doubled and wrong detections."""
    rng = np.random.default_rng(0)
    results = []
    for frame in frames:
        boxes = frame.ground_truth.boxes[[0, 1, 2, 3, 0, 1]]
        boxes[:, :2] += rng.normal(0, 0.6, (6, 2))
        boxes[:, 6:] += rng.normal(0, 0.3, (6, 3))
        labels = [CLASSES.index(name) for name in ("car", "pedestrian", "traffic_cone", "truck", "car", "bus")]
        results.append(detections(boxes, labels, rng.uniform(0.1, 0.9, 6).astype(np.float32)))
    return to_submission(results, frames, CLASSES)


def test_reference_result_file(golden):
    arrays = np.load(golden / "float_forward.npz")
    reference = json.loads((golden / "nuscenes_result.json").read_text())
    (token, expected), *_ = reference["result"]["results"].items()
    (frame,), _ = load_infos(golden / "realframe_info.json")
    assert frame.token == token
    result = detections(
        legacy_to_lidar(arrays["result/boxes_3d"]), arrays["result/labels_3d"], arrays["result/scores_3d"]
    )
    submission = to_submission([result], [frame], CLASSES)
    assert submission["meta"] == reference["result"]["meta"]
    (entries,) = submission["results"].values()
    assert len(entries) == len(expected) == reference["num_boxes_out"]
    for ours, theirs in zip(entries, expected, strict=True):
        assert set(ours) == set(theirs)
        for key in ("sample_token", "detection_name", "attribute_name"):
            assert ours[key] == theirs[key]
        for key in ("translation", "size", "rotation", "velocity", "detection_score"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-5)


def test_ground_truth_becomes_its_own_annotations(frames, nuscenes):
    submission = to_submission([perfect(frame) for frame in frames], frames, CLASSES)
    for frame in frames:
        annotations = [
            nuscenes.get("sample_annotation", token) for token in nuscenes.get("sample", frame.token)["anns"]
        ]
        entries = submission["results"][frame.token]
        assert len(entries) == 4  # the animal is no detection class
        for entry, annotation in zip(entries, annotations, strict=False):
            np.testing.assert_allclose(entry["translation"], annotation["translation"], atol=1e-4)
            np.testing.assert_allclose(entry["size"], annotation["size"], atol=1e-6)
            np.testing.assert_allclose(entry["velocity"], nuscenes.box_velocity(annotation["token"])[:2], atol=0.05)
            # the detection turns about the LiDAR's z axis, which is tilted by up to 0.05 rad
            assert abs(np.dot(entry["rotation"], annotation["rotation"])) > math.cos(0.03)


def test_out_of_range_detections_are_left_out(frames):
    # class ranges are about the ego: car 50 m, pedestrian 40 m, traffic cone 30 m; the LiDAR sits 0.9 m ahead of it
    ahead = np.zeros((6, 9))
    ahead[:, 1] = [48.9, 49.3, 38.9, 39.3, 28.9, 29.3]
    ahead[:, 3:6] = 1
    labels = [
        CLASSES.index(name) for name in ("car", "car", "pedestrian", "pedestrian", "traffic_cone", "traffic_cone")
    ]
    lidar2ego = np.array([[0, 1, 0, 0.9], [-1, 0, 0, 0], [0, 0, 1, 1.8], [0, 0, 0, 1]])  # its y is the ego's x
    frame = dataclasses.replace(frames[0], lidar2ego=lidar2ego)
    (entries,) = to_submission([detections(ahead, labels)], [frame], CLASSES)["results"].values()
    assert [entry["detection_name"] for entry in entries] == ["car", "pedestrian", "traffic_cone"]


def test_attributes_follow_the_speed(frames):
    boxes = np.zeros((20, 9))
    boxes[:, 3:6] = 1
    boxes[10:, 7] = 0.21
    boxes[:10, 8] = 0.19
    (entries,) = to_submission([detections(boxes, [*range(10)] * 2)], frames[:1], CLASSES)["results"].values()
    still = {entry["detection_name"]: entry["attribute_name"] for entry in entries[:10]}
    moving = {entry["detection_name"]: entry["attribute_name"] for entry in entries[10:]}
    vehicles = ("car", "truck", "trailer", "construction_vehicle", "bus")
    assert all(moving[name] == "vehicle.moving" for name in vehicles)
    assert [still[name] for name in vehicles] == ["vehicle.parked"] * 4 + ["vehicle.stopped"]
    assert (still["bicycle"], moving["motorcycle"]) == ("cycle.without_rider", "cycle.with_rider")
    assert (still["pedestrian"], moving["pedestrian"]) == ("pedestrian.standing", "pedestrian.moving")
    assert still["barrier"] == moving["traffic_cone"] == ""


def test_only_the_best_500_are_kept(frames):
    scores = np.linspace(0, 1, 600, dtype=np.float32)[::-1].copy()
    boxes = np.tile([1.0, 2, 0, 1, 1, 1, 0, 0, 0], (600, 1))
    (entries,) = to_submission([detections(boxes, [0] * 600, scores)], frames[:1], CLASSES)["results"].values()
    assert [entry["detection_score"] for entry in entries] == scores[:500].tolist()


def test_perfect_detections(frames, nuscenes):
    scores = score_submission(to_submission([perfect(frame) for frame in frames], frames, CLASSES), nuscenes)
    seen = {"car", "pedestrian", "traffic_cone"}
    assert scores.class_aps == {name: pytest.approx(float(name in seen)) for name in scores.class_aps}
    assert scores.mean_ap == pytest.approx(0.3)
    assert scores.truth_counts == {name: 3 * (name in seen) for name in scores.class_aps}
    assert scores.frames == 3
    assert scores.class_tp_errors["car"]["trans_err"] < 1e-3
    assert scores.class_tp_errors["pedestrian"]["attr_err"] == 0
    assert math.isnan(scores.class_tp_errors["barrier"]["vel_err"])
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["class_tp_errors"]["barrier"]["vel_err"] is None


def test_scores_equal_the_devkit_on_a_whole_split(noisy, nuscenes, tmp_path):
    save_submission(noisy, tmp_path / "results.json")
    config = config_factory("detection_cvpr_2019")
    official = DetectionEval(nuscenes, config, str(tmp_path / "results.json"), "mini_val", str(tmp_path), verbose=False)
    metrics, _ = official.evaluate()
    scores = score_submission(load_submission(tmp_path / "results.json"), nuscenes)
    assert 0.02 < scores.mean_ap < 0.3
    assert scores.mean_ap == metrics.mean_ap
    assert scores.nds == metrics.nd_score
    assert scores.tp_errors == metrics.tp_errors
    assert scores.class_aps == metrics.mean_dist_aps


def test_some_frames_only(noisy, frames, nuscenes):
    token = frames[1].token
    alone = {"meta": noisy["meta"], "results": {token: noisy["results"][token]}}
    subset = score_submission(noisy, nuscenes, [token])
    assert str(subset) == str(score_submission(alone, nuscenes))  # as text, because NaN differs from itself
    assert subset.frames == 1
    assert subset.truth_counts["car"] == 1


def test_no_detections_at_all(frames, nuscenes):
    submission = to_submission([detections(np.zeros((0, 9)), [])] * 3, frames, CLASSES)
    scores = score_submission(submission, nuscenes)
    assert (scores.mean_ap, scores.nds) == (0, 0)


def unknown_token(submission):
    submission["results"]["nowhere"] = []


def missing_token(submission):
    submission["results"].popitem()


def unknown_class(submission):
    next(iter(submission["results"].values()))[0]["detection_name"] = "tank"


def missing_field(submission):
    del next(iter(submission["results"].values()))[0]["velocity"]


def too_many(submission):
    frame = next(iter(submission["results"].values()))
    frame *= 100


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unknown_token, "1 samples that are not in v1.0-mini of .*, first 'nowhere'"),
        (missing_token, "lack 1 of 3 samples, first"),
        (unknown_class, "malformed: .*tank"),
        (missing_field, "malformed: KeyError.*velocity"),
        (too_many, "has 600 detections; nuScenes allows 500"),
    ],
)
def test_bad_submissions_are_refused(noisy, frames, nuscenes, spoil, message):
    submission = json.loads(json.dumps(noisy))
    spoil(submission)
    with pytest.raises(InputError, match=message):
        score_submission(submission, nuscenes, [frame.token for frame in frames])


def test_detections_that_are_not_finite_are_refused(frames):
    result = perfect(frames[0])
    result["boxes_3d"].tensor[0, 3] = math.nan
    with pytest.raises(InputError, match=f"sample {frames[0].token} are not finite"):
        to_submission([result], frames[:1], CLASSES)
    with pytest.raises(InputError, match="class 'tank'"):
        to_submission([], [], ["tank"])


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "not a nuScenes results file")])
def test_files_that_are_no_submission_are_refused(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_submission(tmp_path / "results.json")
    with pytest.raises(InputError, match="can't read"):
        load_submission(tmp_path / "absent.json")
    with pytest.raises(InputError, match="can't write"):
        save_submission({}, tmp_path / "results.json" / "below.json")


def test_tables(frames, nuscenes, noisy):
    good = score_submission(to_submission([perfect(frame) for frame in frames], frames, CLASSES), nuscenes)
    bad = score_submission(noisy, nuscenes)
    summary = summary_table({"FP32": good, "INT8": bad})
    row = next(line for line in summary.splitlines() if "mAP" in line)
    assert [cell.strip() for cell in row.split("|")[2:5]] == [
        "30.00",
        f"{100 * bad.mean_ap:.2f}",
        f"{100 * (bad.mean_ap - good.mean_ap):+.2f}",
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in class_table({"FP32": good}).splitlines()]
    assert ["barrier", "0", "0.00", "1.000", "1.000", "1.000", "-", "-"] in cells
    assert any(row[:3] == ["car", "3", "100.00"] for row in cells)
