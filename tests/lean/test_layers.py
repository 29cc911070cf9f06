"""Each quantised layer against its float layer, and what may not be converted."""

import copy

import pytest
import torch
from mmcv.cnn.bricks import wrappers
from spconv.pytorch import SparseConv3d, SparseConvTensor, SubMConv3d
from torch import nn

from lean.errors import QuantizationError
from lean.layers import LayerSpec, QuantAdd, QuantConcat, QuantLayer, quantised_form, why_float
from lean.layers.sparse import output_axis
from lean.recipe import QuantizerSpec
from lean.switches import disable_quantization
from tests.lean.tiny import Add, Concat, relative_error, voxels

SPEC = LayerSpec(QuantizerSpec(), QuantizerSpec(calibrator="max"))

DENSE = {
    "conv": (nn.Conv2d(6, 8, 3, 2, 1, dilation=2, groups=2), (2, 6, 17, 19)),
    "conv without bias": (nn.Conv2d(3, 4, (1, 5), padding=(0, 2), padding_mode="reflect", bias=False), (1, 3, 8, 8)),
    "conv of mmcv": (wrappers.Conv2d(3, 4, 3, padding="same"), (1, 3, 8, 8)),
    "transposed conv": (nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2, dilation=1), (2, 6, 7, 5)),
    "transposed conv of mmcv": (wrappers.ConvTranspose2d(4, 4, 2, 2), (2, 4, 7, 5)),
    "linear": (nn.Linear(5, 7), (2, 3, 5)),
    "linear of mmcv": (wrappers.Linear(5, 7), (2, 3, 5)),
}


def quantise(module: nn.Module, spec: LayerSpec = SPEC) -> QuantLayer:
    return quantised_form(module).from_float(module, spec)


def set_range(layer: QuantLayer, largest: float) -> None:
    """Calibrate by hand: weights by their maximum, the input to `largest`."""
    layer._input_quantizer.set_amax(torch.tensor(largest))
    if hasattr(layer, "_weight_quantizer"):
        axis = layer._weight_quantizer.axis
        others = [dim for dim in range(layer.weight.dim()) if dim != axis]
        layer._weight_quantizer.set_amax(layer.weight.detach().abs().amax(others, keepdim=True))


@pytest.mark.parametrize("name", DENSE)
def test_dense_layers(name):
    module, shape = DENSE[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = quantise(module)
    assert layer.weight is module.weight
    assert layer.bias is module.bias
    assert why_float(layer) == "it is quantised already"
    before = layer.weight.detach().clone()
    set_range(layer, x.abs().max().item())
    with torch.no_grad():
        expected = module(x)
        assert 1e-4 < relative_error(layer(x), expected) < 0.03
        with disable_quantization(layer):
            assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("axis", "shape"), [(0, (6, 1, 1, 1)), (1, (1, 4, 1, 1))])
def test_scale_axis_of_a_transposed_convolution_is_the_recipes(axis, shape):
    layer = quantise(nn.ConvTranspose2d(6, 4, 2, 2), LayerSpec(SPEC.activation, SPEC.weight, transposed_axis=axis))
    set_range(layer, 1.0)
    assert layer._weight_quantizer.amax.shape == shape


@pytest.mark.parametrize(
    "conv",
    [
        SubMConv3d(5, 8, 3, padding=1, bias=False, indice_key="s"),
        SparseConv3d(5, 8, 3, 2, 1, bias=False, indice_key="d"),
        SparseConv3d(5, 8, (1, 1, 3), (1, 1, 2), bias=False),
    ],
)
def test_sparse_convolutions(conv):
    features, coordinates = voxels()
    x = SparseConvTensor(features, coordinates, [16, 16, 16], 1)
    layer = quantise(conv)
    set_range(layer, features.abs().max().item())
    weight, kept = conv.weight.detach().clone(), features.clone()
    assert layer._weight_quantizer.amax.shape == (8, 1, 1, 1, 1)
    with torch.no_grad():
        expected, out = conv(x), layer(x)
        assert 1e-4 < relative_error(out.features, expected.features) < 0.03
        assert torch.equal(out.indices, expected.indices)
        assert out.spatial_shape == expected.spatial_shape
        with disable_quantization(layer):
            assert torch.equal(layer(x).features, expected.features)
            layer.bias = nn.Parameter(torch.randn(8))
            torch.testing.assert_close(layer(x).features, expected.features + layer.bias)
            layer.activation = "relu"
            torch.testing.assert_close(layer(x).features, (expected.features + layer.bias).relu())
    assert torch.equal(layer.weight, weight)
    assert torch.equal(x.features, kept)


def test_quantised_sparse_sums_are_exact_in_any_order():
    """The order of the input channels changes no bit, unlike with a gradient, where real numbers are summed."""
    coordinates, features = voxels()[1], torch.randn(300, 64)
    order = torch.randperm(64)
    conv = SubMConv3d(64, 8, 3, padding=1, bias=False)
    layer = quantise(conv)
    set_range(layer, 3.0)
    shuffled = quantise(copy.deepcopy(conv))
    shuffled.weight = nn.Parameter(conv.weight.detach()[..., order])
    set_range(shuffled, 3.0)

    def run(layer, features):
        return layer(SparseConvTensor(features, coordinates, [16, 16, 16], 1)).features.detach()

    with torch.no_grad():
        exact, other = run(layer, features), run(shuffled, features[:, order])
    assert torch.equal(exact, other)
    summed = run(layer, features), run(shuffled, features[:, order])
    assert not torch.equal(*summed)
    torch.testing.assert_close(exact, summed[0], rtol=1e-4, atol=1e-5)


def test_sparse_convolutions_of_one_stage_share_a_rulebook():
    features, coordinates = voxels()
    layers = [quantise(SubMConv3d(5, 5, 3, padding=1, bias=False, indice_key="s")) for _ in range(2)]
    for layer in layers:
        set_range(layer, 4.0)
    with torch.no_grad():
        first = layers[0](SparseConvTensor(features, coordinates, [16, 16, 16], 1))
        second = layers[1](first)
    assert second.indice_dict["s"] is first.indice_dict["s"]


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((16, 3, 3, 3, 5), 0), ((3, 3, 3, 5, 16), 4), ((128, 1, 1, 3, 128), 0), ((1, 1, 3, 128, 128), 4)],
)
def test_output_axis_of_either_spconv_layout(shape, axis):
    kernel, channels = ((3, 3, 3), (5, 16)) if 5 in shape else ((1, 1, 3), (128, 128))
    assert output_axis(shape, kernel, *channels) == axis


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [((3, 3, 3, 3, 3), (3, 3), "could be either"), ((8, 3, 3, 3, 5), (5, 16), "is neither")],
)
def test_other_weight_shapes_are_refused(shape, channels, message):
    with pytest.raises(QuantizationError, match=message):
        output_axis(shape, (3, 3, 3), *channels)


def test_state_dict_of_a_sparse_convolution_loads_as_it_was_saved():
    conv = SubMConv3d(5, 8, 3, bias=False)
    layer, other = quantise(conv), quantise(SubMConv3d(5, 8, 3, bias=False))
    set_range(layer, 1.0)
    other.load_state_dict(dict(layer.state_dict()))
    assert torch.equal(other.weight, conv.weight)


@pytest.mark.parametrize("inputs", ["all", "second"])
def test_add(inputs):
    layer = quantise(Add(), LayerSpec(SPEC.activation, SPEC.weight, inputs))
    assert isinstance(layer, QuantAdd)
    layer._input_quantizer.set_amax(torch.tensor(12.7))
    out, identity = torch.tensor([0.04, 0.26]), torch.tensor([0.04, 0.26])
    expected = [0.0, 0.6] if inputs == "all" else [0.04, 0.56]
    torch.testing.assert_close(layer(out, identity), torch.tensor(expected))
    assert out.tolist() == torch.tensor([0.04, 0.26]).tolist()


def test_concat():
    layer = quantise(Concat(dim=2))
    assert isinstance(layer, QuantConcat)
    layer._input_quantizer.set_amax(torch.tensor(12.7))
    out = layer([torch.full((1, 1, 1), 0.26), torch.full((1, 1, 2), 0.04)])
    torch.testing.assert_close(out, torch.tensor([[[0.3, 0.0, 0.0]]]))


class OwnForward(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OwnForward(1, 1, 1), "OwnForward computes something else than Conv2d"),
        (nn.MultiheadAttention(4, 2).out_proj, "MultiheadAttention reads its weight without calling it"),
        (nn.Conv3d(1, 1, 1), "Conv3d has no INT8 form"),
        (nn.Conv1d(1, 1, 1), "Conv1d has no INT8 form"),
        (nn.LayerNorm(4), None),
        (nn.ReLU(), None),
        (nn.Conv2d(1, 1, 1), None),
        (wrappers.Conv2d(1, 1, 1), None),
    ],
)
def test_layers_that_stay_float_say_why(module, reason):
    assert why_float(module) == reason


def test_training_mode_is_taken_over():
    assert not quantise(nn.Conv2d(1, 1, 1).eval()).training
    assert quantise(nn.Conv2d(1, 1, 1)).training


def test_weights_get_gradients_through_the_quantizers():
    layer = quantise(nn.Conv2d(2, 3, 3))
    set_range(layer, 3.0)
    layer(torch.randn(1, 2, 5, 5)).square().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.abs().sum() > 0
