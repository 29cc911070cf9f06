"""The LiDAR backbone: sparse 3D convolutions over (x, y, z) voxels, flattened to a bird's-eye view."""

from collections.abc import Sequence

from mmcv.runner import auto_fp16
from spconv.pytorch import SparseConvTensor, SparseModule, SparseSequential
from torch import Tensor, nn

from bevfusion.errors import InputError
from bevfusion.models.joins import Add
from bevfusion.ops.sparse import SparseConv3d, SubMConv3d
from bevfusion.registry import MODELS


def _norm(channels: int, norm_cfg: dict) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=norm_cfg.get("eps", 1e-3), momentum=norm_cfg.get("momentum", 0.01))


class SparseBasicBlock(SparseModule):
    """Two submanifold 3x3x3 convolutions and a residual add, on one rulebook."""

    def __init__(self, channels: int, norm_cfg: dict, indice_key: str):
        super().__init__()
        self.conv1 = SubMConv3d(channels, channels, 3, padding=1, bias=False, indice_key=indice_key)
        self.bn1 = _norm(channels, norm_cfg)
        self.conv2 = SubMConv3d(channels, channels, 3, padding=1, bias=False, indice_key=indice_key)
        self.bn2 = _norm(channels, norm_cfg)
        self.relu = nn.ReLU(inplace=True)
        self.add = Add()

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Map features (V, channels) to (V, channels) at the same voxels."""
        out = self.conv1(x)
        out = out.replace_feature(self.relu(self.bn1(out.features)))
        out = self.conv2(out)
        out = out.replace_feature(self.bn2(out.features))
        return out.replace_feature(self.relu(self.add(out.features, x.features)))


def _conv_norm_act(conv: nn.Module, norm_cfg: dict) -> SparseSequential:
    return SparseSequential(conv, _norm(conv.out_channels, norm_cfg), nn.ReLU(inplace=True))


@MODELS.register_module()
class SparseEncoder(nn.Module):
    """SECOND's sparse encoder in BEVFusion's (x, y, z) axis order.

    Follows SECOND (Yan et al., 2018) and BEVFusion's `SparseEncoder`.

    Args:
        in_channels: features per voxel.
        sparse_shape: grid cells along x, y, z.
        order: must be conv, norm, act.
        norm_cfg: `eps` and `momentum` of the batch normalisations.
        base_channels, output_channels: channels after the first and the last convolution.
        encoder_channels, encoder_paddings: channels and paddings of each layer of each stage.
        block_type: `basicblock` (residual blocks, one strided convolution ends each stage but the last) or
            `conv_module` (plain convolutions, one strided convolution begins each stage but the first).
    """

    def __init__(
        self,
        in_channels: int,
        sparse_shape: Sequence[int],
        order: Sequence[str] = ("conv", "norm", "act"),
        norm_cfg: dict | None = None,
        base_channels: int = 16,
        output_channels: int = 128,
        encoder_channels: Sequence[Sequence[int]] = ((16,), (32, 32, 32), (64, 64, 64), (64, 64, 64)),
        encoder_paddings: Sequence[Sequence] = ((1,), (1, 1, 1), (1, 1, 1), ((0, 1, 1), 1, 1)),
        block_type: str = "conv_module",
    ):
        super().__init__()
        if tuple(order) != ("conv", "norm", "act"):
            raise InputError(f"SparseEncoder: order {tuple(order)} is not supported, use (conv, norm, act)")
        if block_type not in ("basicblock", "conv_module"):
            raise InputError(f"SparseEncoder: block_type {block_type!r} is neither 'basicblock' nor 'conv_module'")
        self.sparse_shape = list(sparse_shape)
        self.norm_cfg = dict(norm_cfg or {})
        self.fp16_enabled = False
        first = SubMConv3d(in_channels, base_channels, 3, padding=1, bias=False, indice_key="subm1")
        self.conv_input = _conv_norm_act(first, self.norm_cfg)

        self.encoder_layers = SparseSequential()
        channels = base_channels
        make_stage = self._residual_stage if block_type == "basicblock" else self._plain_stage
        for stage, (widths, paddings) in enumerate(zip(encoder_channels, encoder_paddings, strict=True), 1):
            layers = make_stage(stage, len(encoder_channels), channels, widths, paddings)
            self.encoder_layers.add_module(f"encoder_layer{stage}", SparseSequential(*layers))
            channels = widths[-1]

        last = SparseConv3d(channels, output_channels, (1, 1, 3), (1, 1, 2), bias=False, indice_key="spconv_down2")
        self.conv_out = _conv_norm_act(last, self.norm_cfg)

    def _residual_stage(
        self, stage: int, stages: int, channels: int, widths: Sequence[int], paddings: Sequence
    ) -> list:
        layers = []
        for index, (width, padding) in enumerate(zip(widths, paddings, strict=True)):
            if index == len(widths) - 1 and stage != stages:
                key = f"spconv{stage}"
                down = SparseConv3d(channels, width, 3, 2, _axes(padding), bias=False, indice_key=key)
                layers.append(_conv_norm_act(down, self.norm_cfg))
            else:
                layers.append(SparseBasicBlock(width, self.norm_cfg, f"subm{stage}"))
            channels = width
        return layers

    def _plain_stage(
        self, stage: int, stages: int, channels: int, widths: Sequence[int], paddings: Sequence
    ) -> list[nn.Module]:
        layers = []
        for index, (width, padding) in enumerate(zip(widths, paddings, strict=True)):
            if index == 0 and stage > 1:
                conv = SparseConv3d(channels, width, 3, 2, _axes(padding), bias=False, indice_key=f"spconv{stage}")
            else:
                conv = SubMConv3d(channels, width, 3, padding=1, bias=False, indice_key=f"subm{stage}")
            layers.append(_conv_norm_act(conv, self.norm_cfg))
            channels = width
        return layers

    @auto_fp16(apply_to=("voxel_features",))
    def forward(self, voxel_features: Tensor, coors: Tensor, batch_size: int, **_) -> Tensor:
        """Encode voxels into a BEV map.

        Args:
            voxel_features: (V, in_channels) float.
            coors: (V, 4) int32, (batch, x, y, z).

        Returns:
            (B, output_channels * Z, X, Y) float; channel c * Z + z holds feature c at height z.
        """
        x = SparseConvTensor(voxel_features, coors.int(), self.sparse_shape, batch_size)
        x = self.conv_out(self.encoder_layers(self.conv_input(x)))
        dense = x.dense()
        batch, channels, nx, ny, nz = dense.shape
        return dense.permute(0, 1, 4, 2, 3).reshape(batch, channels * nz, nx, ny)


def _axes(padding: int | Sequence[int]) -> int | tuple[int, ...]:
    """Config lists become the tuples that spconv wants."""
    return padding if isinstance(padding, int) else tuple(padding)
