"""Set matching of predictions and ground truth for TransFusion's training."""

from typing import NamedTuple

import torch
from mmdet.core.bbox.assigners import BaseAssigner
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bevfusion.registry import BBOX_ASSIGNERS, IOU_CALCULATORS, MATCH_COSTS


class Matching(NamedTuple):
    """Matched pairs of one frame: prediction indices, ground-truth indices, and their 3D IoU, each (M,)."""

    predictions: Tensor
    truths: Tensor
    ious: Tensor


@MATCH_COSTS.register_module()
class BBoxBEVL1Cost:
    """L1 distance of BEV centres, in units of the point cloud range."""

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, boxes: Tensor, truths: Tensor, point_cloud_range: list[float]) -> Tensor:
        """Cost (P, G) of boxes (P, >=2) and truths (G, >=2), metres."""
        bounds = boxes.new_tensor(point_cloud_range)
        extent = bounds[3:5] - bounds[:2]
        return torch.cdist(boxes[:, :2] / extent, truths[:, :2] / extent, p=1) * self.weight


@MATCH_COSTS.register_module()
class IoU3DCost:
    """Negative 3D IoU."""

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, ious: Tensor) -> Tensor:
        """Cost (P, G) of IoUs (P, G)."""
        return -ious * self.weight


@BBOX_ASSIGNERS.register_module()
class HungarianAssigner3D(BaseAssigner):
    """One prediction per ground-truth box, of least total cost (Carion et al., 2020; Bai et al., 2022)."""

    def __init__(self, cls_cost: dict, reg_cost: dict, iou_cost: dict, iou_calculator: dict):
        self.cls_cost = MATCH_COSTS.build(cls_cost)
        self.reg_cost = MATCH_COSTS.build(reg_cost)
        self.iou_cost = MATCH_COSTS.build(iou_cost)
        self.iou_calculator = IOU_CALCULATORS.build(iou_calculator)

    @torch.no_grad()
    def assign(
        self, boxes: Tensor, truths: Tensor, labels: Tensor, logits: Tensor, point_cloud_range: list[float]
    ) -> Matching:
        """Match predictions to ground truth.

        Args:
            boxes: (P, 7 or 9) predicted, truths: (G, 7 or 9), mmdet3d 1.0 convention.
            labels: (G,) int64.
            logits: (classes, P).
        """
        if len(truths) == 0 or len(boxes) == 0:
            nothing = labels.new_empty(0)
            return Matching(nothing, nothing, boxes.new_empty(0))
        ious = self.iou_calculator(boxes, truths)
        cost = self.cls_cost(logits.T, labels) + self.reg_cost(boxes, truths, point_cloud_range) + self.iou_cost(ious)
        rows, columns = linear_sum_assignment(cost.nan_to_num(1e6).cpu().numpy())
        rows = torch.as_tensor(rows, device=labels.device)
        columns = torch.as_tensor(columns, device=labels.device)
        return Matching(rows, columns, ious[rows, columns])
