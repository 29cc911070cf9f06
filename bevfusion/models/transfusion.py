"""TransFusion's detection head on a BEV map (Bai et al., 2022), as BEVFusion uses it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_conv_layer
from mmcv.runner import force_fp32
from mmdet3d.core import circle_nms
from mmdet3d.core.bbox import LiDARInstance3DBoxes
from torch import Tensor, nn

from bevfusion.errors import InputError
from bevfusion.models.box_coder import Detections
from bevfusion.models.transformer import PredictionHeads, TransformerDecoderLayer
from bevfusion.models.transfusion_loss import TransFusionLoss
from bevfusion.registry import BBOX_CODERS, MODELS

# Classes so small that neighbouring peaks are separate objects: no local-maximum filter for them.
POINT_CLASSES = MappingProxyType({"nuScenes": (8, 9), "Waymo": (1, 2)})
# Radius in metres within which `nms_type: circle` keeps one detection, by class index (nuScenes).
CIRCLE_RADIUS = MappingProxyType({8: 0.175, 9: 0.175})


def _bev_positions(columns: int, rows: int) -> Tensor:
    """Centres of the BEV cells in cells, (1, X*Y, 2), in the order of a flattened (X, Y) map."""
    x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="ij")
    return torch.stack((x, y), dim=-1).view(1, -1, 2) + 0.5


@MODELS.register_module()
class TransFusionHead(nn.Module):
    """Heatmap peaks become queries, a transformer decoder refines them, small heads regress the boxes.

    Args:
        num_proposals: queries a frame.
        auxiliary: supervise every decoder layer, not only the last.
        in_channels: channels of the BEV map; hidden_channel: channels inside.
        num_classes, num_decoder_layers, num_heads, ffn_channel, dropout, activation: of the decoder.
        nms_kernel_size: cells of the local-maximum filter on the heatmap.
        common_heads: name -> (outputs, convolutions) of the regressed quantities.
        train_cfg, test_cfg: dictionaries of the config.
        bbox_coder, loss_cls, loss_bbox, loss_heatmap: configs of these parts.
    """

    def __init__(
        self,
        num_proposals: int,
        in_channels: int,
        num_classes: int,
        common_heads: Mapping[str, Sequence[int]],
        bbox_coder: dict,
        test_cfg: dict,
        train_cfg: dict | None = None,
        auxiliary: bool = True,
        hidden_channel: int = 128,
        num_decoder_layers: int = 3,
        num_heads: int = 8,
        nms_kernel_size: int = 1,
        ffn_channel: int = 256,
        dropout: float = 0.1,
        bn_momentum: float = 0.1,
        activation: str = "relu",
        num_heatmap_convs: int = 2,
        conv_cfg: dict = MappingProxyType({"type": "Conv1d"}),
        norm_cfg: dict = MappingProxyType({"type": "BN1d"}),
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        loss_heatmap: dict | None = None,
    ):
        super().__init__()
        if test_cfg.get("nms_type") not in (None, "circle"):
            raise InputError(f"TransFusionHead: nms_type must be null or 'circle', not {test_cfg['nms_type']!r}")
        self.num_proposals, self.num_classes = num_proposals, num_classes
        self.num_decoder_layers, self.auxiliary = num_decoder_layers, auxiliary
        self.nms_kernel_size, self.test_cfg = nms_kernel_size, test_cfg
        self.bbox_coder = BBOX_CODERS.build(bbox_coder)
        self.fp16_enabled = False

        dense = {"kernel_size": 3, "padding": 1}
        conv2d, norm2d = {"type": "Conv2d"}, {"type": "BN2d"}
        self.shared_conv = build_conv_layer(conv2d, in_channels, hidden_channel, bias=True, **dense)
        self.heatmap_head = nn.Sequential(
            ConvModule(hidden_channel, hidden_channel, conv_cfg=conv2d, norm_cfg=norm2d, **dense),
            build_conv_layer(conv2d, hidden_channel, num_classes, bias=True, **dense),
        )
        self.class_encoding = nn.Conv1d(num_classes, hidden_channel, 1)
        self.decoder = nn.ModuleList(
            TransformerDecoderLayer(hidden_channel, num_heads, ffn_channel, dropout, activation)
            for _ in range(num_decoder_layers)
        )
        heads = {**common_heads, "heatmap": (num_classes, num_heatmap_convs)}
        self.prediction_heads = nn.ModuleList(
            PredictionHeads(hidden_channel, heads, dict(conv_cfg), dict(norm_cfg)) for _ in range(num_decoder_layers)
        )
        self.loss_fn = None
        if train_cfg is not None:
            self.loss_fn = TransFusionLoss(num_classes, self.bbox_coder, train_cfg, loss_cls, loss_bbox, loss_heatmap)

        cells = [size // test_cfg["out_size_factor"] for size in test_cfg["grid_size"][:2]]
        self.register_buffer("bev_pos", _bev_positions(*cells), persistent=False)
        self._init_weights(bn_momentum)

    def _init_weights(self, bn_momentum: float) -> None:
        for parameter in self.decoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.heatmap_head[-1].bias, -2.19)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = bn_momentum

    @property
    def point_classes(self) -> tuple[int, ...]:
        """Classes whose heatmap peaks are taken without the local-maximum filter."""
        return tuple(i for i in POINT_CLASSES.get(self.test_cfg["dataset"], ()) if i < self.num_classes)

    def _peaks(self, heatmap: Tensor) -> Tensor:
        """Zero every cell of (B, classes, X, Y) that is no local maximum; the border counts as none."""
        inner = F.max_pool2d(heatmap, self.nms_kernel_size, stride=1)
        local_max = F.pad(inner, [self.nms_kernel_size // 2] * 4)
        for index in self.point_classes:
            local_max[:, index] = heatmap[:, index]
        return heatmap * (heatmap == local_max)

    @force_fp32()
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Predict from a BEV map (B, in_channels, X, Y).

        Returns:
            center, height, dim, rot, vel, heatmap: (B, n, layers * P), raw regressions of each decoder layer in turn
            (the last layer's alone unless `auxiliary`); query_heatmap_score (B, classes, P); query_labels (B, P);
            query_pos (B, P, 2) in cells; dense_heatmap (B, classes, X, Y), logits.
        """
        features = self.shared_conv(x)
        flat = features.flatten(2)
        positions = self.bev_pos.expand(len(x), -1, -1)

        dense_heatmap = self.heatmap_head(features)
        scores = self._peaks(dense_heatmap.detach().sigmoid()).flatten(2)
        top = scores.flatten(1).topk(self.num_proposals, dim=-1).indices
        labels, cell = top // scores.shape[-1], top % scores.shape[-1]

        query = flat.gather(2, cell[:, None].expand(-1, flat.shape[1], -1))
        one_hot = F.one_hot(labels, self.num_classes).transpose(1, 2)
        query = query + self.class_encoding(one_hot.to(query.dtype))
        first_pos = query_pos = positions.gather(1, cell[..., None].expand(-1, -1, 2))

        layers = []
        for decoder, heads in zip(self.decoder, self.prediction_heads, strict=True):
            query = decoder(query, flat, query_pos, positions)
            prediction = heads(query)
            prediction["center"] = prediction["center"] + query_pos.transpose(1, 2)
            query_pos = prediction["center"].detach().transpose(1, 2)
            layers.append(prediction)
        if not self.auxiliary:
            layers = layers[-1:]
        return {
            **{name: torch.cat([layer[name] for layer in layers], dim=-1) for name in layers[0]},
            "query_heatmap_score": scores.gather(2, cell[:, None].expand(-1, self.num_classes, -1)),
            "query_labels": labels,
            "query_pos": first_pos,
            "dense_heatmap": dense_heatmap,
        }

    @force_fp32()
    def loss(
        self, boxes: Sequence[LiDARInstance3DBoxes], labels: Sequence[Tensor], prediction: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Training losses of a batch, by name; the statistic `matched_ious` carries no gradient."""
        if self.loss_fn is None:
            raise InputError("TransFusionHead: training needs model.heads.object.train_cfg in the config")
        return self.loss_fn(boxes, labels, prediction)

    @torch.no_grad()
    def get_bboxes(self, prediction: dict[str, Tensor]) -> list[Detections]:
        """Detections of each frame from what `forward` returned, which is left as it is."""
        last = {name: prediction[name][..., -self.num_proposals :] for name in self.prediction_heads[-1].names}
        one_hot = F.one_hot(prediction["query_labels"], self.num_classes).transpose(1, 2)
        scores = last["heatmap"].sigmoid() * prediction["query_heatmap_score"] * one_hot
        detections = self.bbox_coder.decode(scores, last)
        if self.test_cfg.get("nms_type") == "circle":
            detections = [_circle_nms(frame) for frame in detections]
        return detections


def _circle_nms(frame: Detections) -> Detections:
    """Keep one detection of a class within its radius; classes without one are left alone."""
    keep = torch.ones_like(frame.labels, dtype=torch.bool)
    for label, radius in CIRCLE_RADIUS.items():
        members = (frame.labels == label).nonzero().squeeze(1)
        table = torch.cat((frame.boxes[members, :2], frame.scores[members, None]), dim=1).cpu().numpy()
        keep[members] = False
        keep[members[circle_nms(table, radius)]] = True
    return Detections(*(field[keep] for field in frame))
