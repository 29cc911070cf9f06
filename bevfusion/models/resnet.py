"""mmdet's ResNet with the residual add as a module."""

from typing import ClassVar

from mmdet.models.backbones import resnet as mmdet_resnet
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bevfusion.models.joins import Add
from bevfusion.registry import MODELS


class ResidualAdd:
    """Mixin for mmdet's residual blocks, which say what is added in `body`: the add is the submodule `add`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add = Add()

    def _residual(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.add(self.body(x), identity)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        recompute = self.with_cp and x.requires_grad
        return self.relu(checkpoint(self._residual, x, use_reentrant=False) if recompute else self._residual(x))


class BasicBlock(ResidualAdd, mmdet_resnet.BasicBlock):
    """Two 3x3 convolutions and a residual add."""

    def body(self, x: Tensor) -> Tensor:
        """Compute the residual branch of `x` (N, C, H, W)."""
        return self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))


class Bottleneck(ResidualAdd, mmdet_resnet.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a residual add."""

    def body(self, x: Tensor) -> Tensor:
        """Compute the residual branch of `x` (N, C, H, W)."""
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x))


@MODELS.register_module()
class ResNet(mmdet_resnet.ResNet):
    """mmdet's ResNet (same arguments, same state dict) built of blocks whose add is a module."""

    arch_settings: ClassVar = {
        depth: (BasicBlock if block is mmdet_resnet.BasicBlock else Bottleneck, stages)
        for depth, (block, stages) in mmdet_resnet.ResNet.arch_settings.items()
    }
