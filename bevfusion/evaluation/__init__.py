"""Score detections with nuScenes' own metrics, or compare two models' without ground truth (`measure_drift`)."""

from bevfusion.evaluation.drift import Boxes, Drift, measure_drift
from bevfusion.evaluation.metrics import DetectionScores, score_submission
from bevfusion.evaluation.report import class_table, summary_table
from bevfusion.evaluation.submission import load_submission, save_submission, to_submission

__all__ = [
    "Boxes",
    "DetectionScores",
    "Drift",
    "class_table",
    "load_submission",
    "measure_drift",
    "save_submission",
    "score_submission",
    "summary_table",
    "to_submission",
]
