"""Targets and losses of the TransFusion head (Bai et al., 2022)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmdet3d.core.bbox import LiDARInstance3DBoxes
from torch import Tensor, nn

from bevfusion.models.box_coder import TransFusionBBoxCoder
from bevfusion.registry import BBOX_ASSIGNERS, MODELS

REGRESSED = ("center", "height", "dim", "rot", "vel")


class QueryTargets(NamedTuple):
    """Targets of the P queries of one frame and layer.

    Attributes:
        labels: (P,) int64; boxes, weights: (P, code); ious: (M,), of the matched queries alone.
    """

    labels: Tensor
    boxes: Tensor
    weights: Tensor
    ious: Tensor


def gaussian_radii(sizes: Tensor, overlap: float) -> Tensor:
    """Largest shifts (G,) of the corners of boxes (G, 2) that keep their IoU with the unshifted box above `overlap`.

    Follows CornerNet (Law and Deng, 2018) as CenterNet implements it, slip included: the roots are not divided by 2a.
    """
    perimeter, area = sizes.sum(dim=1), sizes.prod(dim=1)
    cases = (
        (1.0, perimeter, area * (1 - overlap) / (1 + overlap)),
        (4.0, 2 * perimeter, (1 - overlap) * area),
        (4 * overlap, -2 * overlap * perimeter, (overlap - 1) * area),
    )
    return torch.stack([(b + (b * b - 4 * a * c).sqrt()) / 2 for a, b, c in cases]).amin(dim=0)


def draw_gaussians(centres: Tensor, radii: Tensor, shape: tuple[int, int]) -> Tensor:
    """Draw a Gaussian of height 1 at each centre (G, 2), cut off `radii` (G,) cells from it: (G, X, Y)."""
    sigmas = (2 * radii + 1) / 6
    lines = []
    for axis, length in enumerate(shape):
        offset = (torch.arange(length, device=centres.device) - centres[:, axis, None]).abs()
        line = torch.exp(-(offset**2) / (2 * sigmas[:, None] ** 2))
        lines.append(line * (offset <= radii[:, None]))
    return lines[0][:, :, None] * lines[1][:, None, :]


class TransFusionLoss(nn.Module):
    """Focal loss on the heatmap, and focal and L1 losses on the queries matched to ground truth.

    Args:
        num_classes: also the label of the background.
        coder: between boxes and regression targets.
        config: the head's `train_cfg`.
        loss_cls, loss_bbox, loss_heatmap: configs of the losses.
    """

    def __init__(
        self,
        num_classes: int,
        coder: TransFusionBBoxCoder,
        config: Mapping,
        loss_cls: dict,
        loss_bbox: dict,
        loss_heatmap: dict,
    ):
        super().__init__()
        self.num_classes, self.coder, self.config = num_classes, coder, config
        self.loss_cls = MODELS.build(loss_cls)
        self.loss_bbox = MODELS.build(loss_bbox)
        self.loss_heatmap = MODELS.build(loss_heatmap)
        self.assigner = BBOX_ASSIGNERS.build(config["assigner"])

    def query_targets(self, truths: Tensor, labels: Tensor, boxes: Tensor, logits: Tensor) -> QueryTargets:
        """Match the predictions of one frame and layer to its ground truth.

        Args:
            truths: (G, 7 or 9), labels: (G,).
            boxes: (P, 7 or 9) decoded predictions, logits: (classes, P).
        """
        match = self.assigner.assign(boxes, truths, labels, logits, self.config["point_cloud_range"])
        classes = labels.new_full((len(boxes),), self.num_classes)
        classes[match.predictions] = labels[match.truths]
        targets = boxes.new_zeros(len(boxes), self.coder.code_size)
        targets[match.predictions] = self.coder.encode(truths[match.truths])
        weights = torch.zeros_like(targets)
        weights[match.predictions] = boxes.new_tensor(self.config["code_weights"][: self.coder.code_size])
        return QueryTargets(classes, targets, weights, match.ious)

    def heatmap_target(self, truths: Tensor, labels: Tensor) -> Tensor:
        """Draw a Gaussian at each ground-truth centre: (classes, X, Y), the largest where they meet."""
        factor = self.config["out_size_factor"]
        columns, rows = (size // factor for size in self.config["grid_size"][:2])
        cell = truths.new_tensor(self.config["voxel_size"][:2]) * factor
        origin = truths.new_tensor(self.config["point_cloud_range"][:2])
        sizes = truths[:, 3:5] / cell
        drawn = (sizes > 0).all(dim=1)
        sizes, labels = sizes[drawn], labels[drawn]
        centres = ((truths[drawn, :2] - origin) / cell).int()
        radii = gaussian_radii(sizes, self.config["gaussian_overlap"]).int().clamp(min=self.config["min_radius"])
        gaussians = draw_gaussians(centres, radii, (columns, rows))
        heatmap = truths.new_zeros(self.num_classes, columns, rows)
        return heatmap.scatter_reduce_(0, labels[:, None, None].expand_as(gaussians), gaussians, "amax")

    def forward(
        self, boxes: Sequence[LiDARInstance3DBoxes], labels: Sequence[Tensor], prediction: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Losses by name of a batch of predictions (see `TransFusionHead.forward`)."""
        logits = prediction["heatmap"]
        truths = [frame.tensor.to(logits.device) for frame in boxes]
        labels = [frame.to(logits.device) for frame in labels]

        heatmap = torch.stack([self.heatmap_target(t, c) for t, c in zip(truths, labels, strict=True)])
        peaks = heatmap.eq(1).sum().clamp(min=1).item()
        probability = prediction["dense_heatmap"].sigmoid().clamp(1e-4, 1 - 1e-4)
        losses = {"loss_heatmap": self.loss_heatmap(probability, heatmap, avg_factor=peaks)}

        regressed = torch.cat([prediction[name] for name in REGRESSED if name in prediction], dim=1)
        with torch.no_grad():
            decoded = self.coder.decode_boxes(
                {name: prediction[name].detach() for name in REGRESSED if name in prediction}
            )
        queries = prediction["query_labels"].shape[1]
        layers = logits.shape[-1] // queries
        for layer in range(layers):
            part = slice(layer * queries, (layer + 1) * queries)
            targets = [
                self.query_targets(t, c, b[part], s[:, part].detach())
                for t, c, b, s in zip(truths, labels, decoded, logits, strict=True)
            ]
            prefix = "layer_-1" if layer == layers - 1 else f"layer_{layer}"
            losses.update(self._layer_losses(prefix, targets, logits[..., part], regressed[..., part]))
        losses["matched_ious"] = torch.stack([t.ious.sum() / max(len(t.ious), 1) for t in targets]).mean()
        return losses

    def _layer_losses(self, prefix: str, targets: Sequence[QueryTargets], logits: Tensor, regressed: Tensor) -> dict:
        labels, boxes, weights = (torch.cat([t[field] for t in targets]) for field in range(3))
        matched = max(sum(len(t.ious) for t in targets), 1)
        pos_weight = self.config["pos_weight"]
        label_weights = torch.ones_like(labels, dtype=logits.dtype)
        if pos_weight > 0:
            label_weights[labels < self.num_classes] = pos_weight
        scores = logits.transpose(1, 2).reshape(-1, self.num_classes)
        codes = regressed.transpose(1, 2).reshape(len(labels), -1)
        return {
            f"{prefix}_loss_cls": self.loss_cls(scores, labels, label_weights, avg_factor=matched),
            f"{prefix}_loss_bbox": self.loss_bbox(codes, boxes, weights, avg_factor=matched),
        }
