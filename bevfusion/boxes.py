"""The two box conventions, and the one place where they meet.

Inside the project boxes follow mmdet3d 1.0's `LiDARInstance3DBoxes`: (x, y, z_bottom, length, width, height, yaw, ...).
Info files and trained checkpoints of BEVFusion are older ("legacy"): (x, y, z, width, length, height, r, ...) with
r = -yaw - pi/2. Columns after the seventh (velocities) are the same in both, and so is z: whether it is the bottom or
the gravity centre depends on where a box comes from, not on the convention. Info files store the gravity centre: build
`LiDARInstance3DBoxes(legacy_to_lidar(boxes), origin=(0.5, 0.5, 0.5))` from them. Decoded head outputs store the bottom.
"""

import math
from typing import TypeVar

import numpy as np
import torch

Boxes = TypeVar("Boxes", np.ndarray, torch.Tensor)


def legacy_to_lidar(boxes: Boxes) -> Boxes:
    """Convert legacy boxes (N, >=7) to mmdet3d 1.0's (N, >=7), z as it is; a copy is returned."""
    out = boxes.clone() if isinstance(boxes, torch.Tensor) else np.array(boxes)
    out[:, 3], out[:, 4] = boxes[:, 4], boxes[:, 3]
    out[:, 6] = -boxes[:, 6] - math.pi / 2
    return out


lidar_to_legacy = legacy_to_lidar  # swapping the sides and mirroring the yaw is its own inverse
