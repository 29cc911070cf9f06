"""Between boxes in metres and what the TransFusion head regresses."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.core.bbox import BaseBBoxCoder
from torch import Tensor

from bevfusion.boxes import legacy_to_lidar, lidar_to_legacy
from bevfusion.registry import BBOX_CODERS


class Detections(NamedTuple):
    """Boxes (K, 7 or 9) in mmdet3d 1.0 convention, scores (K,) and labels (K,) int64 of one frame."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@BBOX_CODERS.register_module()
class TransFusionBBoxCoder(BaseBBoxCoder):
    """Codes a box as BEV cell, centre height, log size, sine and cosine of the heading, and velocity.

    Follows TransFusion (Bai et al., 2022). Trained checkpoints regress legacy boxes (see `bevfusion.boxes`); this is
    where they become mmdet3d 1.0 boxes and back.

    Args:
        pc_range: (x, y) of the grid's corner in metres.
        out_size_factor: voxels per BEV cell.
        voxel_size: (x, y) in metres.
        post_center_range: (x, y, z, x, y, z) in metres; decoded boxes centred outside are dropped.
        score_threshold: decoded boxes scoring at most this are dropped.
        code_size: 10 with velocity, 8 without.
    """

    def __init__(
        self,
        pc_range: Sequence[float],
        out_size_factor: int,
        voxel_size: Sequence[float],
        post_center_range: Sequence[float] | None = None,
        score_threshold: float | None = None,
        code_size: int = 8,
    ):
        super().__init__()
        self.origin = tuple(pc_range[:2])
        self.cell = tuple(size * out_size_factor for size in voxel_size[:2])
        self.post_center_range = post_center_range
        self.score_threshold = score_threshold
        self.code_size = code_size

    def encode(self, boxes: Tensor) -> Tensor:
        """Encode boxes (K, 7 or 9; mmdet3d 1.0, bottom centre) as regression targets (K, code_size)."""
        boxes = lidar_to_legacy(boxes)
        origin, cell = boxes.new_tensor(self.origin), boxes.new_tensor(self.cell)
        height = boxes[:, 2:3] + boxes[:, 5:6] / 2
        heading = torch.stack((boxes[:, 6].sin(), boxes[:, 6].cos()), dim=1)
        velocity = boxes[:, 7:] if self.code_size == 10 else boxes[:, :0]
        return torch.cat(((boxes[:, :2] - origin) / cell, height, boxes[:, 3:6].log(), heading, velocity), dim=1)

    def decode_boxes(self, prediction: dict[str, Tensor]) -> Tensor:
        """Decode head maps center, height, dim, rot and optionally vel, each (B, n, P), to boxes (B, P, 7 or 9)."""
        center, size = prediction["center"], prediction["dim"].exp()
        origin, cell = center.new_tensor(self.origin), center.new_tensor(self.cell)
        xy = center * cell[:, None] + origin[:, None]
        bottom = prediction["height"] - size[:, 2:3] / 2
        yaw = torch.atan2(prediction["rot"][:, 0:1], prediction["rot"][:, 1:2])
        velocity = [prediction["vel"]] if "vel" in prediction else []
        boxes = torch.cat((xy, bottom, size, yaw, *velocity), dim=1).transpose(1, 2)
        return legacy_to_lidar(boxes.flatten(0, 1)).view_as(boxes)

    def decode(self, scores: Tensor, prediction: dict[str, Tensor]) -> list[Detections]:
        """Decode head maps to detections per frame; `scores` is (B, classes, P) in 0..1."""
        boxes = self.decode_boxes(prediction)
        best, labels = scores.max(dim=1)
        keep = torch.ones_like(best, dtype=torch.bool)
        if self.score_threshold is not None:
            keep &= best > self.score_threshold
        if self.post_center_range is not None:
            bounds = boxes.new_tensor(self.post_center_range)
            keep &= ((boxes[..., :3] >= bounds[:3]) & (boxes[..., :3] <= bounds[3:])).all(dim=-1)
        return [Detections(b[k], s[k], c[k]) for b, s, c, k in zip(boxes, best, labels, keep, strict=True)]
