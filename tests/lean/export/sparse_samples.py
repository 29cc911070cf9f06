"""LiDAR backbones to export: small ones, and the full one with the reference's weights."""

import json
from pathlib import Path

import numpy as np
import torch
from spconv.pytorch import SparseConvTensor, SparseModule
from torch import Tensor, nn

from bevfusion.models.sparse_encoder import SparseEncoder
from bevfusion.registry import MODELS
from lean import quantize
from lean.calibrate import calibrate_weights
from lean.export.rounding import round_to_file
from lean.fold import fold_sparse
from lean.switches import named_quantizers
from tests.golden_model import golden_config, golden_state_dict, is_sparse
from tests.lean.golden_names import our_quantizer

BACKBONE = "encoders.lidar.backbone"
ONE_VOXEL = (torch.zeros(1, 5), torch.zeros(1, 4, dtype=torch.int32))
SMALL = {
    "in_channels": 5,
    "sparse_shape": (40, 32, 41),
    "base_channels": 8,
    "output_channels": 16,
    "encoder_channels": ((8, 8, 12), (12, 12, 16), (16, 16, 24), (24, 24)),
    "encoder_paddings": ((0, 0, 1), (0, 0, 1), (0, 0, (1, 1, 0)), (0, 0)),
    "block_type": "basicblock",
}


def voxels(count: int = 600, channels: int = 5, grid: tuple = (40, 32, 41)) -> tuple[Tensor, Tensor]:
    """Random features (V, channels) and distinct coordinates (V, 4) in no order; x stays below half the grid."""
    generator = np.random.default_rng(0)
    cells = generator.choice(grid[0] // 2 * grid[1] * grid[2], count, replace=False)
    places = np.stack(np.unravel_index(cells, (grid[0] // 2, *grid[1:])), 1)
    coordinates = np.concatenate([np.zeros((count, 1)), places], 1)
    return torch.from_numpy(generator.normal(size=(count, channels))).float(), torch.from_numpy(coordinates).int()


def float_backbone(**changes: object) -> nn.Module:
    """A small backbone with random weights and statistics, the same on every call, in evaluation mode."""
    torch.manual_seed(0)
    backbone = SparseEncoder(**(SMALL | changes))
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 5:
            # Far fewer than all taps meet a voxel.
            nn.init.normal_(weight, std=(3 / weight[0].numel()) ** 0.5)
    return backbone.eval()


def quantised(backbone: nn.Module, *inputs: Tensor, disable: tuple[str, ...] = ("conv_input.*",)) -> nn.Module:
    """Quantise, fold and calibrate `backbone` on features and coordinates, then disable some layers."""
    quantize.initialize()
    quantize.quantize_encoders_lidar_branch(backbone)
    fold_sparse(backbone)
    quantize.calibrate_model(backbone, [inputs], "cpu", lambda net, batch: net(*batch, 1), method="max")
    quantize.disable_layers(backbone, disable)
    return backbone


def small_backbone(**changes: object) -> nn.Module:
    """A small calibrated backbone."""
    grid = changes.get("sparse_shape", SMALL["sparse_shape"])
    return quantised(float_backbone(**changes), *voxels(600, changes.get("in_channels", 5), grid))


def golden_backbone(golden: Path) -> nn.Module:
    """The full backbone with the reference's weights, quantised, and its amax for the activations."""
    quantize.initialize()
    config = golden_config(golden)["model"]["encoders"]["lidar"]["backbone"]
    model = nn.ModuleDict({"encoders": nn.ModuleDict({"lidar": nn.ModuleDict({"backbone": MODELS.build(config)})})})
    state = golden_state_dict(model)
    model.load_state_dict({k: v.permute(4, 0, 1, 2, 3) if is_sparse(k, v.shape) else v for k, v in state.items()})
    backbone = model.get_submodule(BACKBONE).eval()
    quantize.quantize_encoders_lidar_branch(backbone)
    fold_sparse(backbone)
    calibrate_weights(backbone)
    ours = named_quantizers(model)
    for reference in json.loads((golden / "ptq_reference.json").read_text())["quantizers"]:
        quantizer = ours.get(our_quantizer(reference["name"]))
        if quantizer is not None and quantizer.axis is None:
            quantizer.set_amax(torch.tensor(reference["amax"]))
    quantize.disable_layers(backbone, ["conv_input.*"])
    return backbone


class InDouble(SparseModule):
    """A layer in float mode whose sums no order of summation changes, so that nothing behind it rounds differently."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv.double()

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Compute in float64, return float32."""
        out = self.conv(x.replace_feature(x.features.double()))
        return out.replace_feature(out.features.float())


def exact(backbone: nn.Module) -> nn.Module:
    """Give `backbone` the numbers of its file, and let its first layer, which is not quantised, compute in float64."""
    round_to_file(backbone)
    setattr(backbone.conv_input, "0", InDouble(backbone.conv_input[0]))
    return backbone


def cosine(actual: np.ndarray, expected: np.ndarray | Tensor) -> float:
    """Cosine of the angle between two tensors."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (actual, expected))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def distance(actual: np.ndarray, expected: np.ndarray | Tensor) -> float:
    """Relative L2 distance."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (actual, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
