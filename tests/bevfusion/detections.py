"""Results as a model gives them, made by hand."""

import numpy as np
import torch
from mmdet3d.core.bbox import LiDARInstance3DBoxes

from bevfusion.data.records import Frame

CLASSES = (
    *("car", "truck", "construction_vehicle", "bus", "trailer"),
    *("barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone"),
)


def detections(boxes: np.ndarray, labels, scores=None) -> dict:
    """A model's result from boxes (M, 9)."""
    return {
        "boxes_3d": LiDARInstance3DBoxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 9), box_dim=9),
        "labels_3d": torch.as_tensor(np.array(labels, dtype=np.int64)),
        "scores_3d": torch.ones(len(boxes)) if scores is None else torch.as_tensor(scores),
    }


def perfect(frame: Frame) -> dict:
    """The ground truth of a frame as detections."""
    truth = frame.ground_truth
    rows = [row for row, name in enumerate(truth.names) if name in CLASSES]
    return detections(truth.boxes[rows], [CLASSES.index(truth.names[row]) for row in rows])
