"""Costs of layers, against counts by hand; which layer feeds which; the estimate of mixed precision."""

import pytest
import torch
from spconv.pytorch import SparseConv3d, SparseConvTensor, SubMConv3d
from torch import nn

from lean.bevfusion_recipe import default_recipe
from lean.cost import CostModel, LayerCost, int8_layers, int8_share, layer_cost, measure_costs
from lean.insert import insert_quantizers
from lean.rulebook import neighbours
from lean.switches import disable_layers, quantized_layers
from tests.lean.tiny import TinyFusion, batch, run, voxels


def cost_of(module: nn.Module, *args) -> LayerCost:
    return layer_cost(module, args, module(*args))


@pytest.mark.parametrize(
    ("module", "shape", "macs", "values"),
    [
        # outputs 2 x 8 x 3 x 4, each a sum of 2 x 3 x 3 products; weights 8 x 2 x 9 + 8
        (nn.Conv2d(4, 8, 3, 2, 1, groups=2), (2, 4, 6, 8), 192 * 18, (384, 152, 192)),
        (nn.Conv1d(4, 8, 1, bias=False), (1, 4, 10), 80 * 4, (40, 32, 80)),
        # each of 4 x 3 x 3 inputs goes into 6 x 2 x 2 outputs
        (nn.ConvTranspose2d(4, 6, 2, 2, bias=False), (1, 4, 3, 3), 36 * 24, (36, 96, 216)),
        (nn.Linear(5, 7), (2, 3, 5), 6 * 35, (30, 42, 42)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_dense_layers(module, shape, macs, values):
    cost = cost_of(module, torch.zeros(shape))
    assert (cost.macs, (cost.inputs, cost.weights, cost.outputs)) == (macs, values)
    assert cost.bytes_at(2) == 2 * sum(values)


def test_attention_counts_its_projections():
    module = nn.MultiheadAttention(8, 2)
    query, key = torch.zeros(3, 1, 8), torch.zeros(5, 1, 8)
    cost = cost_of(module, query, key, key)
    assert cost.macs == (3 + 5 + 5 + 3) * 8 * 8
    assert cost.outputs == 24


@pytest.mark.parametrize("make", [
    lambda: SubMConv3d(5, 7, 3, padding=1, bias=False, indice_key="a"),
    lambda: SparseConv3d(5, 7, 3, 2, 1, bias=False),
    lambda: SparseConv3d(5, 7, (1, 1, 3), (1, 1, 2), bias=False),
])  # fmt: skip
def test_pairs_of_sparse_convolutions_are_those_of_the_dense_one(make):
    conv = make()
    features, cells = voxels(count=400)
    x = SparseConvTensor(features, cells, [16, 16, 16], 1)
    with torch.no_grad():
        y = conv(x)
        found = neighbours(conv, x, y)
        stride, padding = ((1, 1, 1), (1, 1, 1)) if conv.subm else (conv.stride, conv.padding)
        occupied = SparseConvTensor(torch.ones(400, 1), cells, [16, 16, 16], 1).dense()
        touched = nn.functional.conv3d(occupied, torch.ones(1, 1, *conv.kernel_size), stride=stride, padding=padding)
        expected = touched[0, 0][tuple(y.indices.long().T[1:])]
        gathered = torch.where((found >= 0)[..., None], x.features[found], 0.0)
        again = torch.einsum("tvi,oti->vo", gathered, conv.weight.flatten(1, 3))
    assert torch.equal((found >= 0).sum(0).float(), expected)
    assert torch.allclose(again, y.features, atol=1e-5)
    macs = layer_cost(conv, (x,), y).macs
    assert macs == int(expected.sum()) * 35 and type(macs) is int


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, dict[str, LayerCost]]:
    torch.manual_seed(0)
    model = TinyFusion()
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    disable_layers(model, recipe.disable)
    for layer in model.modules():
        if hasattr(layer, "_disabled"):
            layer._disabled = True  # not calibrated: the frame runs in float
    costs = measure_costs(model, lambda: run(model, batch()))
    for layer in model.modules():
        if hasattr(layer, "_disabled"):
            layer._disabled = False
    disable_layers(model, recipe.disable)
    return model, costs


def test_producers_follow_the_frame(tiny):
    _, costs = tiny
    camera = "encoders.camera"
    block = f"{camera}.backbone.layer1.0"
    assert costs[f"{camera}.backbone.conv1"].producers == ()
    assert costs[f"{block}.conv2"].producers == (f"{block}.conv1",)
    assert costs[f"{block}.add"].producers == (f"{camera}.backbone.conv1", f"{block}.conv2")
    assert costs["fuser.0"].producers == (f"{camera}.vtransform.downsample.0", "encoders.lidar.backbone.conv_out.0")
    assert costs["head.0"].producers == ("decoder.neck.deblocks.0.0", "decoder.neck.deblocks.1.0")
    sparse = "encoders.lidar.backbone.encoder_layers.encoder_layer1.0"
    assert costs[f"{sparse}.add"].producers == ("encoders.lidar.backbone.conv_input.0", f"{sparse}.conv2")
    assert costs[f"{sparse}.add"].macs == 0 < costs[f"{sparse}.add"].inputs


def test_a_frame_leaves_no_hooks(tiny):
    assert not any(module._forward_hooks for module in tiny[0].modules())


def test_the_share_is_of_all_layers(tiny):
    model, costs = tiny
    int8 = int8_layers(model)
    assert "fuser.0" in int8
    assert not {"head.0", "decoder.neck.deblocks.0.0"} & int8
    total = sum(cost.macs for cost in costs.values())
    left = sum(cost.macs for name, cost in costs.items() if name not in int8)
    assert int8_share(costs, int8) == pytest.approx(1 - left / total)
    assert 0 < left < total
    among = quantized_layers(model)
    quantisable = sum(costs[name].macs for name in among)
    assert int8_share(costs, int8, among) == pytest.approx(1 - (left - costs_of_float(costs, among)) / quantisable)


def costs_of_float(costs, quantised) -> int:
    return sum(cost.macs for name, cost in costs.items() if name not in quantised)


def test_a_frame_without_voxels_has_no_pairs():
    conv = SubMConv3d(5, 7, 3, padding=1, bias=False)
    x = SparseConvTensor(torch.zeros(0, 5), torch.zeros(0, 4).int(), [16, 16, 16], 1)
    assert neighbours(conv, x, x).shape == (27, 0)


def chain(**macs: int) -> CostModel:
    """Layers one after the other, 10 values between them."""
    names = list(macs)
    costs = {
        name: LayerCost("Conv2d", macs[name], 10, 5, 10, tuple(names[max(i - 1, 0) : i]))
        for i, name in enumerate(names)
    }
    return CostModel(costs, macs_per_byte=2.0)


def test_time_is_computing_or_moving_and_borders():
    model = chain(a=1000, b=10, c=1000)
    assert model.time({"a", "b", "c"}) == 1000 + 25 * 2 + 1000
    assert model.time(set()) == 2000 + 50 * 2 + 2000
    assert model.borders({"a", "c"}) == {"a", "b"}
    assert model.time({"a", "c"}) == 1000 + 100 + 1000 + 2 * 30 * 2
    assert model.borders({"c"}) == {"b"}


def test_a_lone_layer_costs_more_than_one_beside_another():
    model = chain(a=100, b=100, c=100, d=100)
    everything = {"a", "b", "c", "d"}
    lone = model.time(everything - {"b"}) - model.time(everything)
    beside = model.time(everything - {"b", "c"}) - model.time(everything - {"c"})
    assert beside < lone


def test_an_output_is_converted_once_for_all_its_readers():
    costs = {"a": LayerCost("Conv2d", 1, 1, 1, 8)}
    costs |= {name: LayerCost("Conv2d", 1, 8, 1, 1, ("a",)) for name in "bc"}
    model = CostModel(costs, macs_per_byte=1.0)
    assert model.time({"a"}) == 10 + 2 * (20) + 3 * 8
