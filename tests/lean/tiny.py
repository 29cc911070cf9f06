"""Small models with the module paths of BEVFusion, for tests."""

from types import SimpleNamespace

import torch
from spconv.pytorch import SparseConv3d, SparseConvTensor, SparseModule, SparseSequential, SubMConv3d
from torch import Tensor, nn


class Add(nn.Module):
    def forward(self, out: Tensor, identity: Tensor) -> Tensor:
        return out + identity


class Concat(nn.Module):
    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, self.dim)


class ConvModule(nn.Module):
    """Like mmcv's: `conv`, then a norm whose name is in `norm_name`, then ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.norm_name, self.order, self.with_norm = "bn", ("conv", "norm", "act"), True

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class ResidualBlock(nn.Module):
    """Two convolutions and an add; `downsample` where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu, self.add = nn.ReLU(inplace=True), Add()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.add(out, x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    """Four residual stages, of which the last three come out."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.out_indices = (1, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        for stage in range(1, 5):
            inputs = width if stage == 1 else width * 2 ** (stage - 2)
            outputs = width * 2 ** (stage - 1)
            blocks = ResidualBlock(inputs, outputs, 1 if stage == 1 else 2), ResidualBlock(outputs, outputs, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.bn1(self.conv1(x)).relu()
        outs = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            outs.append(x)
        return outs[1:]


class Neck(nn.Module):
    """Each level is joined with the upsampled coarser one."""

    def __init__(self, widths: tuple[int, ...], outputs: int = 8):
        super().__init__()
        merged = (widths[0] + outputs, widths[1] + widths[2])
        self.lateral_convs = nn.ModuleList(ConvModule(width, outputs, 1) for width in merged)
        self.fpn_convs = nn.ModuleList(ConvModule(outputs, outputs, 3) for _ in merged)
        self.concats = nn.ModuleList(Concat() for _ in merged)

    def forward(self, levels: list[Tensor]) -> Tensor:
        levels = list(levels)
        for i in (1, 0):
            coarse = nn.functional.interpolate(levels[i + 1], size=levels[i].shape[2:])
            levels[i] = self.fpn_convs[i](self.lateral_convs[i](self.concats[i]([levels[i], coarse])))
        return levels[0]


class DepthNet(nn.Module):
    """A view transform without geometry: depth net, then the downsampling that stays float."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.depthnet = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(True))
        self.downsample = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.depthnet(x))


class SparseBlock(SparseModule):
    """Two submanifold convolutions and an add of features."""

    def __init__(self, width: int, key: str):
        super().__init__()
        self.conv1 = SubMConv3d(width, width, 3, padding=1, bias=False, indice_key=key)
        self.bn1 = nn.BatchNorm1d(width, eps=1e-3)
        self.conv2 = SubMConv3d(width, width, 3, padding=1, bias=False, indice_key=key)
        self.bn2 = nn.BatchNorm1d(width, eps=1e-3)
        self.relu, self.add = nn.ReLU(inplace=True), Add()

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        out = self.conv1(x)
        out = self.conv2(out.replace_feature(self.relu(self.bn1(out.features))))
        return out.replace_feature(self.relu(self.add(self.bn2(out.features), x.features)))


class SparseBackbone(nn.Module):
    """Sparse encoder over a 16 x 16 x 16 grid; takes (features, coordinates)."""

    def __init__(self, inputs: int = 5, width: int = 8):
        super().__init__()

        def sequence(conv: nn.Module) -> SparseSequential:
            return SparseSequential(conv, nn.BatchNorm1d(conv.out_channels, eps=1e-3), nn.ReLU(inplace=True))

        self.conv_input = sequence(SubMConv3d(inputs, width, 3, padding=1, bias=False, indice_key="a"))
        down = sequence(SparseConv3d(width, 2 * width, 3, 2, 1, bias=False, indice_key="d"))
        self.encoder_layers = SparseSequential()
        self.encoder_layers.add_module("encoder_layer1", SparseSequential(SparseBlock(width, "a"), down))
        self.conv_out = sequence(SparseConv3d(2 * width, 2 * width, (1, 1, 3), (1, 1, 2), bias=False, indice_key="o"))

    def forward(self, voxels: tuple[Tensor, Tensor]) -> Tensor:
        x = SparseConvTensor(voxels[0], voxels[1], [16, 16, 16], 1)
        return self.conv_out(self.encoder_layers(self.conv_input(x))).dense().permute(0, 1, 4, 2, 3).flatten(1, 2)


class Decoder(nn.Module):
    """Two scales, the coarser one brought back by a transposed convolution with as many inputs as outputs."""

    def __init__(self, inputs: int, width: int = 8):
        super().__init__()

        def block(conv: nn.Module, outputs: int) -> nn.Sequential:
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(True))

        fine = block(nn.Conv2d(inputs, width, 3, 1, 1, bias=False), width)
        coarse = block(nn.Conv2d(width, width, 3, 2, 1, bias=False), width)
        self.backbone, self.neck = nn.Module(), nn.Module()
        self.backbone.blocks = nn.ModuleList([fine, coarse])
        up = nn.ConvTranspose2d(width, width, 2, 2, bias=False)
        self.neck.deblocks = nn.ModuleList([block(nn.Conv2d(width, width, 1, bias=False), width), block(up, width)])

    def forward(self, x: Tensor) -> Tensor:
        fine = self.backbone.blocks[0](x)
        coarse = self.backbone.blocks[1](fine)
        return torch.cat([self.neck.deblocks[0](fine), self.neck.deblocks[1](coarse)], 1)


class TinyFusion(nn.Module):
    """Camera and LiDAR branches, fuser, decoder and a head that stays float."""

    def __init__(self):
        super().__init__()
        camera = nn.ModuleDict({"backbone": Backbone(), "neck": Neck((8, 16, 32)), "vtransform": DepthNet()})
        lidar = nn.ModuleDict({"backbone": SparseBackbone()})
        self.encoders = nn.ModuleDict({"camera": camera, "lidar": lidar})
        self.fuser = nn.Sequential(nn.Conv2d(8 + 16 * 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.decoder = Decoder(8)
        self.head = nn.Sequential(nn.Conv1d(16, 4, 1, bias=False), nn.BatchNorm1d(4))
        randomise_norms(self)
        self.eval()

    def forward(self, images: Tensor, voxels: tuple[Tensor, Tensor]) -> Tensor:
        camera = self.encoders["camera"]
        x = camera["vtransform"](camera["neck"](camera["backbone"](images)))
        lidar = self.encoders["lidar"]["backbone"](voxels)
        x = nn.functional.interpolate(x, size=lidar.shape[-2:])
        return self.head(self.decoder(self.fuser(torch.cat([x, lidar], 1))).flatten(2))


def randomise_norms(model: nn.Module) -> None:
    """Give every batch normalisation statistics and weights that a wrong fold can't survive."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)


def voxels(seed: int = 0, count: int = 300) -> tuple[Tensor, Tensor]:
    """Random features (V, 5) at distinct coordinates (V, 4) of the grid of `SparseBackbone`."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(16**3, generator=generator)[:count]
    coordinates = torch.stack([cells * 0, cells // 256, cells // 16 % 16, cells % 16], 1).int()
    return torch.randn(count, 5, generator=generator), coordinates


def batch(seed: int = 0) -> SimpleNamespace:
    """One input of `TinyFusion`."""
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(images=torch.randn(1, 3, 64, 64, generator=generator), voxels=voxels(seed))


def run(model: nn.Module, one: SimpleNamespace) -> Tensor:
    """Forward one `batch`."""
    with torch.no_grad():
        return model(one.images, one.voxels)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()
