"""nuScenes' official detection metrics over any set of frames."""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from nuscenes import NuScenes
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.evaluate import DetectionEval

from bevfusion.errors import InputError
from bevfusion.evaluation.submission import CONFIG


@dataclass(frozen=True)
class DetectionScores:
    """Result of the official evaluation (detection_cvpr_2019); all AP values are fractions.

    tp_errors and class_tp_errors: by the devkit's names trans_err (m), scale_err (1 - IoU), orient_err (rad),
    vel_err (m/s), attr_err (1 - accuracy); NaN where the metric is not defined for a class.
    truth_counts: ground-truth boxes by class, after the devkit's filters; a class without any has AP 0.
    """

    mean_ap: float
    nds: float
    tp_errors: dict[str, float]
    class_aps: dict[str, float]
    class_tp_errors: dict[str, dict[str, float]]
    truth_counts: dict[str, int]
    frames: int

    def to_dict(self) -> dict:
        """All of it as plain dicts and numbers for JSON, which knows no NaN: None stands for it."""
        return _without_nan(asdict(self))


class FrameEval(DetectionEval):
    """The official evaluation with its boxes given, over chosen frames instead of a whole split."""

    def __init__(self, nusc: NuScenes, pred_boxes: EvalBoxes, gt_boxes: EvalBoxes):
        self.nusc, self.cfg, self.verbose = nusc, CONFIG, False
        self.pred_boxes, self.gt_boxes = (self._filtered(boxes) for boxes in (pred_boxes, gt_boxes))
        self.sample_tokens = gt_boxes.sample_tokens

    def _filtered(self, boxes: EvalBoxes) -> EvalBoxes:
        """The devkit's filters: distance to the car, points in the box, bicycle racks."""
        if not boxes.all:  # the devkit can't tell the kind of no boxes
            return boxes
        return filter_eval_boxes(self.nusc, add_center_dist(self.nusc, boxes), self.cfg.class_range)


def score_submission(submission: Mapping, nuscenes: NuScenes, tokens: Iterable[str] | None = None) -> DetectionScores:
    """Score a submission with the official metrics.

    Args:
        submission: as `to_submission` or `load_submission` give it.
        nuscenes: opened tables.
        tokens: the frames that count (default: all frames of the submission).

    Raises:
        InputError: the submission names unknown samples, lacks some of `tokens`, or holds a malformed detection.
    """
    results = submission["results"]
    known = {sample["token"] for sample in nuscenes.sample}
    unknown = [token for token in results if token not in known]
    if unknown:
        raise InputError(
            f"the results name {len(unknown)} samples that are not in {nuscenes.version} of {nuscenes.dataroot}, "
            f"first {unknown[0]!r}; evaluate them against the data set they were made from"
        )
    tokens = list(results if tokens is None else tokens)
    absent = [token for token in tokens if token not in results]
    if absent or not tokens:
        raise InputError(f"the results lack {len(absent)} of {len(tokens)} samples, first {(absent or [''])[0]!r}")
    evaluation = FrameEval(nuscenes, _predictions(results, tokens), _ground_truth(nuscenes, tokens))
    metrics, _ = evaluation.evaluate()
    names = list(CONFIG.class_names)
    errors = list(metrics.tp_errors)
    counts = Counter(box.detection_name for box in evaluation.gt_boxes.all)
    return DetectionScores(
        mean_ap=metrics.mean_ap,
        nds=metrics.nd_score,
        tp_errors=metrics.tp_errors,
        class_aps={name: float(metrics.mean_dist_aps[name]) for name in names},
        class_tp_errors={name: {error: float(metrics.get_label_tp(name, error)) for error in errors} for name in names},
        truth_counts={name: counts[name] for name in names},
        frames=len(tokens),
    )


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _predictions(results: Mapping[str, list], tokens: list[str]) -> EvalBoxes:
    boxes = EvalBoxes()
    for token in tokens:
        if not isinstance(results[token], list):
            raise InputError(f"the results of sample {token} are not a list of detections")
        if len(results[token]) > CONFIG.max_boxes_per_sample:
            raise InputError(f"sample {token} has {len(results[token])} detections; nuScenes allows 500")
        try:
            boxes.add_boxes(token, [DetectionBox.deserialize(entry) for entry in results[token]])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"a detection of sample {token} in the results is malformed: {error!r}") from error
    return boxes


def _ground_truth(nuscenes: NuScenes, tokens: list[str]) -> EvalBoxes:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the devkit's own progress bar
            return load_gt_of_sample_tokens(nuscenes, tokens, DetectionBox)
    except Exception as error:  # the devkit raises plain Exception for an annotation with two attributes
        raise InputError(f"the devkit can't load the ground truth of {nuscenes.version}: {error}") from error
