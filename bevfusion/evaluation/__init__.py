"""Score detections with nuScenes' own metrics: submission format, official `DetectionEval`, tables."""

from bevfusion.evaluation.metrics import DetectionScores, score_submission
from bevfusion.evaluation.report import class_table, summary_table
from bevfusion.evaluation.submission import load_submission, save_submission, to_submission

__all__ = [
    "DetectionScores",
    "class_table",
    "load_submission",
    "save_submission",
    "score_submission",
    "summary_table",
    "to_submission",
]
