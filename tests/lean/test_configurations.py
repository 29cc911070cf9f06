"""The default recipe on the other models of the family."""

import pytest
import torch
from torch import nn

from bevfusion.config import load_config
from bevfusion.models import build_model
from bevfusion.models.resnet import ResNet
from lean import quantize
from lean.bevfusion_recipe import camera_branch, default_recipe
from lean.calibrate import check_calibrated
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_branch, insert_quantizers
from lean.recipe import BranchRecipe
from lean.sharing import sharing_groups
from lean.switches import quantized_layers
from tests.conftest import ROOT
from tests.golden_model import golden_batch, golden_model

TRANSFUSION = ROOT / "configs/nuscenes/det/transfusion/secfpn"
SHARED_NECK = [[f"encoders.camera.neck.lateral_convs.{i}.conv", f"encoders.camera.neck.concats.{i}"] for i in (0, 1)]


def norms(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize(
    ("depth", "layers", "groups"),
    [(18, 20 + 8, 8), (34, 36 + 16, 16), (50, 53 + 16, 16), (101, 104 + 33, 33)],
)
def test_resnets(depth, layers, groups):
    model = nn.ModuleDict({"backbone": ResNet(depth=depth, out_indices=(1, 2, 3))})
    rules = camera_branch()
    done = insert_branch(model, BranchRecipe("camera", rules.quantize[:2], rules.share))
    assert (len(done.quantised), len(sharing_groups(model)), done.left_float) == (layers, groups, {})
    assert all(len(group) == 2 for group in sharing_groups(model))
    shortcut = "downsample.0" if depth >= 50 else "add"
    assert sharing_groups(model)[0] == ["backbone.layer1.0.conv1", f"backbone.layer1.0.{shortcut}"]
    fold_dense(model)
    assert norms(model) == set()


@pytest.mark.slow
def test_swin_transformer(golden):
    model = golden_model(golden, "swint_v0p075_convfuser")
    done = insert_quantizers(model, default_recipe(model))
    assert done.left_float == {}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoders.camera")}
    assert len(linears) == 12 * 4 + 3
    assert linears <= set(done.quantised)
    assert sharing_groups(model) == SHARED_NECK
    fold_dense(model)
    fold_sparse(model)
    assert all(name.startswith("heads.") for name in norms(model))
    with torch.no_grad():
        batches = quantize.calibrate_model(model, [golden_batch(golden)], "cpu", lambda m, b: m(**b), method="max")
    assert batches == 1
    check_calibrated(model)


@pytest.mark.slow
def test_lidar_only():
    model = build_model(load_config(TRANSFUSION / "lidar/voxelnet_0p075.yaml")["model"])
    recipe = default_recipe(model)
    assert [branch.path for branch in recipe.branches] == ["encoders.lidar.backbone", "decoder"]
    done = insert_quantizers(model, recipe)
    assert done.left_float == {}
    assert set(done.quantised) == set(quantized_layers(model))
    assert sharing_groups(model) == []
    assert quantize.disable_layers(model, recipe.disable) == [
        "encoders.lidar.backbone.conv_input.0",
        "decoder.neck.deblocks.0.0",
    ]
