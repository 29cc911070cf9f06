"""Adaptive rounding: nearer outputs than nearest rounding gives, on the grid that the quantizer reproduces."""

import itertools

import pytest
import torch
from torch import nn

from lean.adaround import Moments, can_round, choose_rounding, round_weights
from lean.errors import QuantizationError
from lean.switches import disable_layers, quantized_layers
from tests.lean.tiny import batch, run
from tests.lean.tiny_quantised import calibrated

CAMERA = "encoders.camera.backbone"
CHOSEN = (
    f"{CAMERA}.layer1.0.conv1",
    f"{CAMERA}.layer2.0.downsample.0",
    "encoders.lidar.backbone.encoder_layers.encoder_layer1.0.conv1",
    "encoders.lidar.backbone.conv_out.0",
)


def exact_moments(inputs: torch.Tensor, weight: torch.Tensor) -> Moments:
    return Moments.of(inputs, weight @ inputs, weight)


def test_the_quadratic_form_is_the_squared_error():
    torch.manual_seed(0)
    inputs, weight = torch.randn(6, 50), torch.randn(3, 6)
    outputs = weight @ (inputs + 0.1 * torch.randn(6, 50))
    other = weight + 0.1 * torch.randn(3, 6)
    expected = (other @ inputs - outputs).square().sum(dim=1)
    assert torch.allclose(Moments.of(inputs, outputs, weight).error(other - weight), expected, rtol=1e-4)
    halves = [
        Moments.of(part[0], part[1], weight) for part in zip(inputs.chunk(2, 1), outputs.chunk(2, 1), strict=True)
    ]
    assert torch.allclose((halves[0] + halves[1]).error(other - weight), expected, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_comes_close_to_the_best_there_is(seed):
    torch.manual_seed(seed)
    inputs = torch.randn(8, 2) @ torch.randn(2, 200) + 0.1 * torch.randn(8, 200)  # what nearest rounding is bad at
    weight, scale = torch.randn(4, 8), torch.full((4, 1), 0.25)
    moments = exact_moments(inputs, weight)
    grid = choose_rounding(weight, scale, moments)
    floor = (weight / scale).floor()
    assert ((grid == floor) | (grid == floor + 1)).all()
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
    best = torch.stack([moments.error((floor + up) * scale - weight) for up in ups]).amin(dim=0).sum()
    nearest = moments.error((weight / scale).round() * scale - weight).sum()
    found = moments.error(grid * scale - weight).sum()
    assert best <= found * 1.0001 < best + 0.25 * (nearest - best)


def test_bounds_are_kept_and_a_channel_never_gets_worse():
    torch.manual_seed(0)
    inputs, weight = torch.randn(5, 100), torch.tensor([[127.4, -128.3, 0.5, 1.49, -3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    moments = exact_moments(inputs, weight)
    grid = choose_rounding(weight, torch.ones(2, 1), moments)
    assert grid[0, :2].tolist() == [127, -128]
    assert not grid[1].any()
    assert (moments.error(grid - weight) <= moments.error(weight.round().clamp(-128, 127) - weight)).all()


@pytest.fixture(scope="module")
def rounded() -> tuple[nn.Module, dict, dict]:
    model = calibrated()
    before = {
        name: layer.weight.detach().clone()
        for name, layer in quantized_layers(model).items()
        if hasattr(layer, "weight")
    }
    errors = round_weights(model, CHOSEN, [batch(0), batch(1)], run)
    return model, before, errors


def test_every_kind_of_layer_comes_nearer_to_its_float_output(rounded):
    _, _, errors = rounded
    assert list(errors) == list(CHOSEN)
    assert all(0 < chosen < nearest for nearest, chosen in errors.values()), errors


def test_the_quantizer_reproduces_the_chosen_weights(rounded):
    model, before, _ = rounded
    for name, layer in quantized_layers(model).items():
        if name in CHOSEN:
            quantizer = layer._weight_quantizer
            step = quantizer.amax / 127
            assert torch.allclose(quantizer(layer.weight), layer.weight, rtol=0, atol=1e-6)
            assert ((layer.weight - before[name]).abs() < step * 1.0001).all()
            assert not torch.equal(layer.weight, quantizer(before[name]))
        elif name in before:
            assert torch.equal(layer.weight, before[name])


def test_the_quantised_layer_really_is_nearer():
    """The errors reported are those of the layer itself, quantised, on its float input."""
    name = "fuser.0"
    model = calibrated()
    layer = quantized_layers(model)[name]
    torch.manual_seed(0)
    x = torch.randn(1, layer.in_channels, 16, 16)
    exact = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)

    def error() -> float:
        with torch.no_grad():
            off, power = (layer(x) - exact).square().sum(), (exact - layer.bias.view(1, -1, 1, 1)).square().sum()
        return (off / power).item()

    before = error()
    only = nn.ModuleDict({"fuser": nn.Sequential(layer)})
    nearest, chosen = round_weights(only, [name], [x], lambda net, one: net["fuser"](one))[name]
    assert nearest == pytest.approx(before, rel=1e-3)
    assert chosen == pytest.approx(error(), rel=1e-3)
    assert chosen < nearest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fuser.1", "nearest: 'fuser.0'"),
        ("decoder.neck.deblocks.1.0", "can't be rounded"),
        (f"{CAMERA}.layer1.0.add", "can't be rounded"),
        ("decoder.neck.deblocks.0.0", "can't be rounded"),
    ],
)
def test_layers_that_can_not_be_rounded(name, message):
    model = calibrated()
    disable_layers(model, ["decoder.neck.deblocks.0.0"])
    assert can_round(quantized_layers(model)["fuser.0"])
    with pytest.raises(QuantizationError, match=message):
        round_weights(model, [name], [batch()], run)


def test_a_layer_that_saw_no_data_is_named():
    with pytest.raises(QuantizationError, match=r"no data reached fuser\.0"):
        round_weights(calibrated(), ["fuser.0"], [], run)
