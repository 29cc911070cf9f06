"""Fusion of the sensors' BEV features."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bevfusion.registry import MODELS


@MODELS.register_module()
class ConvFuser(nn.Sequential):
    """Concatenate along the channels, then one 3x3 convolution.

    Args:
        in_channels: channels of each sensor, in the order of the inputs.
        out_channels: channels of the result.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int):
        super().__init__(
            nn.Conv2d(sum(in_channels), out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(True),
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Map tensors (B, C_i, X, Y) to (B, out_channels, X, Y)."""
        return super().forward(torch.cat(list(inputs), dim=1))


@MODELS.register_module()
class AddFuser(nn.Module):
    """Mean of one 3x3 convolution per sensor; a training step may leave one sensor out.

    Args:
        in_channels: channels of each sensor, in the order of the inputs.
        out_channels: channels of the result.
        dropout: probability that a training step leaves one sensor out.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.transforms = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(True),
            )
            for channels in in_channels
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Map tensors (B, C_i, X, Y) to (B, out_channels, X, Y)."""
        features = [transform(x) for transform, x in zip(self.transforms, inputs, strict=True)]
        if self.training and len(features) > 1 and random.random() < self.dropout:
            del features[random.randrange(len(features))]
        return sum(features) / len(features)
