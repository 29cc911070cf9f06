"""The feature pyramid of BEVFusion's camera branch."""

from collections.abc import Sequence
from types import MappingProxyType

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmcv.runner import BaseModule
from torch import Tensor, nn

from bevfusion.models.joins import Concat
from bevfusion.registry import MODELS


@MODELS.register_module()
class GeneralizedLSSFPN(BaseModule):
    """Top-down pyramid that concatenates each level with the upsampled coarser one.

    Follows BEVFusion (Liu et al., 2022), `GeneralizedLSSFPN`.

    Args:
        in_channels: channels of the backbone's levels, finest first.
        out_channels: channels of every output level.
        num_outs: accepted as configs give it; the number of outputs is `len(in_channels) - 1 - start_level`.
        start_level: first backbone level used.
        upsample_cfg: `mode` and `align_corners` of the interpolation.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        no_norm_on_lateral: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = MappingProxyType({"type": "BN2d"}),
        act_cfg: dict | None = MappingProxyType({"type": "ReLU"}),
        upsample_cfg: dict = MappingProxyType({"mode": "bilinear", "align_corners": True}),
    ):
        super().__init__()
        self.start_level = start_level
        self.upsample_cfg = dict(upsample_cfg)
        last = len(in_channels) - 1
        self.lateral_convs, self.fpn_convs, self.concats = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(start_level, last):
            coarser = in_channels[level + 1] if level == last - 1 else out_channels
            lateral_norm = None if no_norm_on_lateral else norm_cfg
            common = {"conv_cfg": conv_cfg, "act_cfg": act_cfg, "inplace": False}
            width = in_channels[level] + coarser
            self.lateral_convs.append(ConvModule(width, out_channels, 1, norm_cfg=lateral_norm, **common))
            self.fpn_convs.append(ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, **common))
            self.concats.append(Concat(dim=1))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map the backbone's levels, each (N, C_i, H_i, W_i), to (N, out_channels, H_i, W_i), finest first."""
        levels = list(inputs[self.start_level :])
        for i in reversed(range(len(self.lateral_convs))):
            coarse = F.interpolate(levels[i + 1], size=levels[i].shape[2:], **self.upsample_cfg)
            merged = self.concats[i]([levels[i], coarse])
            levels[i] = self.fpn_convs[i](self.lateral_convs[i](merged))
        return tuple(levels[: len(self.lateral_convs)])
