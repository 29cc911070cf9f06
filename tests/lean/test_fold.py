"""Batch normalisations folded into convolutions."""

import copy

import pytest
import torch
from spconv.pytorch import SparseConvTensor, SubMConv3d
from torch import nn

from lean import funcs
from lean.bevfusion_recipe import default_recipe
from lean.errors import QuantizationError
from lean.fold import Pair, fold_dense, fold_pair, fold_sparse
from lean.insert import insert_quantizers
from lean.switches import disable_quantization
from tests.lean.tiny import ConvModule, TinyFusion, batch, randomise_norms, relative_error, run, voxels


def normalised(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    model = nn.Sequential(conv, norm)
    randomise_norms(model)
    return model.eval()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.ConvTranspose2d(4, 4, 2, 2, bias=False),
        nn.ConvTranspose2d(4, 4, 3, 2, 1),
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False),
    ],
    ids=["conv", "grouped conv", "transposed, in == out", "transposed with bias", "grouped transposed"],
)
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
def test_dense_fold_is_exact(conv, eps):
    model = normalised(conv, nn.BatchNorm2d(conv.out_channels, eps=eps)).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = model(x)
    assert fold_dense(model) == [Pair("0", "1")]
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_norm_without_affine_parameters():
    model = normalised(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
    model[1] = nn.BatchNorm2d(3, affine=False).double().eval()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    expected = model(x)
    fold_dense(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_float_convolutions_own_parameter_is_not_written():
    conv = nn.Conv2d(3, 3, 1)
    weight, kept = conv.weight, conv.weight.detach().clone()
    fold_dense(normalised(conv, nn.BatchNorm2d(3)))
    assert torch.equal(weight, kept)
    assert conv.weight is not weight


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "quantised"])
def test_whole_model(quantised):
    model = TinyFusion()
    expected = run(model, batch())
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}
    if quantised:
        insert_quantizers(model, default_recipe(model))
    dense = fold_dense(model)
    sparse = fold_sparse(model.encoders["lidar"]["backbone"]) if quantised else []
    folded = {pair.norm for pair in dense} | {f"encoders.lidar.backbone.{pair.norm}" for pair in sparse}
    one_dimensional = {n for n in norms if n.startswith("encoders.lidar")} if not quantised else set()
    assert norms - folded == {"head.1"} | one_dimensional
    assert "decoder.neck.deblocks.1.1" in folded
    assert "encoders.camera.vtransform.downsample.1" in folded
    with disable_quantization(model):
        assert relative_error(run(model, batch()), expected) < 1e-6


def test_sparse_fold_reads_eps_and_the_output_axis():
    conv = SubMConv3d(5, 8, 3, padding=1, bias=False)
    norm = nn.BatchNorm1d(8, eps=0.5).eval()
    randomise_norms(norm)
    features, coordinates = voxels()
    x = SparseConvTensor(features, coordinates, [16, 16, 16], 1)
    with torch.no_grad():
        expected = norm(conv(x).features)
        fold_pair(conv, norm)
        bias, conv.bias = conv.bias, None  # spconv has no bias on the CPU
        torch.testing.assert_close(conv(x).features + bias, expected, rtol=1e-4, atol=1e-5)


class Reversed(nn.Module):
    """Lists its norm right after a convolution whose output it does not read."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.norm(x))


def test_neighbours_by_luck_are_not_folded():
    assert fold_dense(Reversed()) == []
    norm_first = ConvModule(4, 4, 1)
    norm_first.order = ("norm", "conv", "act")
    assert fold_dense(norm_first) == []
    assert fold_dense(nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])) == []


def test_names_of_mmdets_residual_blocks():
    from mmdet.models.backbones.resnet import Bottleneck

    block = Bottleneck(16, 4, norm_cfg={"type": "BN"}, conv_cfg=None).eval()
    randomise_norms(block)
    x = torch.randn(1, 16, 8, 8)
    expected = block(x)
    assert fold_dense(block) == [Pair(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_mmcvs_conv_module():
    from mmcv.cnn import ConvModule as MmcvConvModule

    module = MmcvConvModule(3, 4, 3, norm_cfg={"type": "BN"}).eval()
    randomise_norms(module)
    x = torch.randn(1, 3, 8, 8)
    expected = module(x)
    assert fold_dense(module) == [Pair("conv", "bn")]
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_is_named():
    with pytest.raises(QuantizationError, match=r"folding 1 into 0: .*no running statistics"):
        fold_dense(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)))
    with pytest.raises(QuantizationError, match="folding 1 into 0: 3 output channels, but 4 are normalised"):
        fold_dense(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(4)))
    conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(QuantizationError, match=r"0\.0 is used in several places"):
        fold_dense(nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3))))


def test_folding_after_calibration_is_refused():
    model = TinyFusion()
    insert_quantizers(model, default_recipe(model))
    model.fuser[0]._weight_quantizer.set_amax(torch.ones(8, 1, 1, 1))
    with pytest.raises(QuantizationError, match=r"fuser\.1 into fuser\.0: .*fold before calibration"):
        fold_dense(model)


def test_the_scripts_functions_return_their_module():
    model = TinyFusion()
    backbone = model.encoders["lidar"]["backbone"]
    assert funcs.layer_fusion_bn(backbone) is backbone
    assert funcs.fuse_conv_bn(model) is model
    assert isinstance(model.fuser[1], nn.Identity)
    assert isinstance(backbone.conv_input[1], nn.Identity)


def test_folding_is_the_same_on_a_copy():
    model = TinyFusion()
    other = copy.deepcopy(model)
    assert fold_dense(model) == fold_dense(other)
    assert torch.equal(model.fuser[0].weight, other.fuser[0].weight)
