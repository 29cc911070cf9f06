"""The clean-up of exported graphs, on small modules: what it drops, and that the result computes the same."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from lean.calibrate import calibrate_weights
from lean.export.dense import trace
from lean.export.graph import GraphView, infer_shapes
from lean.export.lint import lint
from lean.insert import insert_branch
from lean.recipe import BranchRecipe, LayerRule
from lean.switches import named_quantizers
from tests.lean.export.samples import distance, run


def quantised(module: nn.Module) -> nn.Module:
    insert_branch(module, BranchRecipe("part", (LayerRule("*"),)))
    calibrate_weights(module)
    for quantizer in named_quantizers(module).values():
        if quantizer.axis is None:
            quantizer.set_amax(torch.tensor(4.0))
    return module.eval()


class Sizes(nn.Module):
    """Computes with its input's sizes, which makes the exporter write them as nodes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = nn.functional.interpolate(x, size=[2 * n for n in x.shape[2:]])
        return (up.flatten(2) * up.shape[-1]).reshape(x.shape[0], x.shape[1] * 2, -1)


class Fork(nn.Module):
    """Two layers that read one tensor with one quantizer."""

    def __init__(self):
        super().__init__()
        self.pool, self.a, self.b = nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(x)
        return self.a(x) + self.b(x)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_sizes_become_constants():
    module, x = Sizes(), torch.randn(1, 2, 4, 6)
    model = trace(module, {"x": x}, ["y"], 13)
    assert not {"Shape", "Constant", "Concat", "Gather", "Cast", "Unsqueeze"} & set(operators(model))
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [1, 4, 48]
    assert distance(run(model.SerializeToString(), x=x)["y"], module(x)) < 1e-6


def test_equal_parameters_are_read_without_identities():
    module = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))
    for layer in module:
        nn.init.zeros_(layer.bias)
    model = trace(module, {"x": torch.randn(1, 3, 2, 2)}, ["y"], 13)
    assert operators(model) == ["Conv"] * 3


def test_each_reader_has_its_own_pair():
    module = quantised(Fork())
    module.b._input_quantizer = module.a._input_quantizer
    x = torch.randn(1, 4, 8, 8)
    model = trace(module, {"x": x}, ["y"], 13)
    view = GraphView(model)
    assert operators(model).count("QuantizeLinear") == 4
    assert all(len(view.readers[n.output[0]]) == 1 for n in model.graph.node if n.op_type == "DequantizeLinear")
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    with torch.no_grad():
        assert distance(run(model.SerializeToString(), x=x)["y"], module(x)) < 1e-3


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_linear_layers_run_in_int8(shape):
    module = quantised(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    x = torch.randn(shape)
    model = trace(module, {"x": x}, ["y"], 13)
    assert "Transpose" not in operators(model)
    findings = lint(model)
    assert [finding.why_float for finding in findings] == [None, None]
    with torch.no_grad():
        assert distance(run(model.SerializeToString(), x=x)["y"], module(x)) < 1e-3


def test_a_transposed_convolution_has_a_scale_for_each_input_channel():
    module = quantised(nn.Sequential(nn.ConvTranspose2d(6, 4, 2, stride=2)))
    x = torch.randn(1, 6, 3, 3)
    model = trace(module, {"x": x}, ["y"], 13)
    (finding,) = lint(model)
    assert finding.why_float is None
    view = GraphView(model)
    weight = view.source(model.graph.node[-1].input[1])
    assert view.array(weight.input[1]).shape == (6,)
    with torch.no_grad():
        assert distance(run(model.SerializeToString(), x=x)["y"], module(x)) < 1e-3


def test_plugin_nodes_keep_the_shape_of_their_input():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Norm", ["x", "w"], ["n"], domain="nv", axis=-1), helper.make_node("Relu", ["n"], ["y"])]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], np.ones(3, np.float32))
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("nv", 1)]
    shapes = infer_shapes(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=opsets))
    assert shapes["n"] == shapes["y"] == (TensorProto.FLOAT, [2, 3])
