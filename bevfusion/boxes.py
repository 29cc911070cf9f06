"""The two box conventions, and the one place where they meet.

Inside the project boxes follow mmdet3d 1.0's `LiDARInstance3DBoxes`: (x, y, z_bottom, length, width, height, yaw, ...).
Info files and trained checkpoints of BEVFusion are older ("legacy"): (x, y, z_centre, width, length, height, r, ...) with
r = -yaw - pi/2. Columns after the seventh (velocities) are the same in both.
"""

import math
from typing import TypeVar

import numpy as np
import torch

Boxes = TypeVar("Boxes", np.ndarray, torch.Tensor)


def _convert(boxes: Boxes, lift: float) -> Boxes:
    """Swap length and width, mirror the yaw, and raise z by `lift` heights; (N, >=7) in, a copy out."""
    out = boxes.clone() if isinstance(boxes, torch.Tensor) else np.array(boxes)
    out[:, 2] += lift * boxes[:, 5]
    out[:, 3], out[:, 4] = boxes[:, 4], boxes[:, 3]
    out[:, 6] = -boxes[:, 6] - math.pi / 2
    return out


def legacy_to_lidar(boxes: Boxes) -> Boxes:
    """Convert legacy boxes (N, 7 or 9; z at the gravity centre) to mmdet3d 1.0's (z at the bottom)."""
    return _convert(boxes, -0.5)


def lidar_to_legacy(boxes: Boxes) -> Boxes:
    """Convert mmdet3d 1.0 boxes (N, 7 or 9; z at the bottom) to legacy ones (z at the gravity centre)."""
    return _convert(boxes, 0.5)
