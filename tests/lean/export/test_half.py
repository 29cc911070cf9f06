"""The rewriting to FP16 on small graphs made by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lean.errors import QuantizationError
from lean.export.half import SMALL_PROBABILITIES, check_half_range, to_half
from tests.lean.export.samples import distance, run

RNG = np.random.default_rng(0)


def graph(nodes, inputs: dict, outputs: dict, **constants: np.ndarray) -> onnx.ModelProto:
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in group.items()]
        for group in (inputs, outputs)
    ]
    made = [
        helper.make_node(op, i.split(), o.split(), f"n{k}", **attributes)
        for k, (op, i, o, attributes) in enumerate(nodes)
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    body = helper.make_graph(made, "g", *values, tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def quantised_product(weight: np.ndarray, scale: np.ndarray, activation_scale: float) -> onnx.ModelProto:
    nodes = [
        ("QuantizeLinear", "x sx z", "xq", {}),
        ("DequantizeLinear", "xq sx z", "xd", {}),
        ("QuantizeLinear", "w sw zw", "wq", {"axis": 1}),
        ("DequantizeLinear", "wq sw zw", "wd", {"axis": 1}),
        ("MatMul", "xd wd", "y", {}),
    ]
    constants = {"w": weight, "sw": scale, "sx": np.float32(activation_scale), "z": np.int8(0)}
    zeros = np.zeros(len(scale), np.int8)
    return graph(nodes, {"x": [3, len(weight)]}, {"y": [3, weight.shape[1]]}, **constants, zw=zeros)


def test_quantised_weights_keep_their_integers_whatever_their_scale():
    weight = RNG.standard_normal((64, 8)).astype(np.float32) * np.float32(10.0) ** np.arange(-5, 3, dtype=np.float32)
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    integers = np.clip(np.rint(weight / scale), -128, 127)
    half, report = to_half(quantised_product(weight, scale, 0.05))
    constants = {t.name: numpy_helper.to_array(t).astype(np.float32) for t in half.graph.initializer}
    kept = scale >= 2.0**-18
    assert 0 < kept.sum() < 8
    found = np.rint(constants["w"] / constants["sw"])
    np.testing.assert_array_equal(found[:, kept], integers[:, kept])
    np.testing.assert_allclose(found[:, ~kept], weight[:, ~kept] / 2.0**-18, atol=0.5)
    np.testing.assert_allclose(constants["sw"], np.maximum(scale, 2.0**-18), rtol=0.008)
    assert report.raised == {"w": 8 - kept.sum()}
    assert report.lines() == [f"{8 - kept.sum()} scales of w raised to 2^-18"]


def test_a_rewritten_product_computes_the_same():
    weight = RNG.standard_normal((64, 8)).astype(np.float32)
    model = quantised_product(weight, (np.abs(weight).max(axis=0) / 127).astype(np.float32), 2.0**-5)
    x = (RNG.integers(-100, 100, (3, 64)) / 32).astype(np.float32)  # on the grid: nothing to round
    wide = run(model.SerializeToString(), x=x)["y"]
    half, report = to_half(model)
    assert report.float32 == {}
    narrow = run(half.SerializeToString(), x=x)["y"]
    assert narrow.dtype == np.float16
    assert distance(narrow, wide) < 1e-3


@pytest.mark.parametrize(("keys", "kept"), [(2**14, True), (2**14 - 1, False)])
def test_attention_over_many_keys_stays_float32(keys, kept):
    nodes = [
        ("MatMul", "q k", "s", {}),
        ("Softmax", "s", "p", {"axis": -1}),
        ("MatMul", "p v", "a", {}),
        ("Transpose", "a", "t", {"perm": [1, 0]}),
        ("MatMul", "t w", "y", {}),
    ]
    inputs = {"q": [2, 4], "k": [4, keys], "v": [keys, 4]}
    weight = RNG.standard_normal((2, 4)).astype(np.float32)
    model = graph(nodes, inputs, {"y": [4, 4]}, w=weight)
    values = {name: 0.1 * RNG.standard_normal(shape).astype(np.float32) for name, shape in inputs.items()}
    wide = run(model.SerializeToString(), **values)["y"]
    half, report = to_half(model)
    assert report.float32 == ({f"n{k}": SMALL_PROBABILITIES for k in (1, 2, 3)} if kept else {})
    casts = [(n.input[0], helper.get_attribute_value(n.attribute[0])) for n in half.graph.node if n.op_type == "Cast"]
    wanted = [("s", TensorProto.FLOAT), ("v", TensorProto.FLOAT), ("t", TensorProto.FLOAT16)]
    assert casts == (wanted if kept else [])
    assert distance(run(half.SerializeToString(), **values)["y"], wide) < 5e-3


def test_an_output_in_float32_is_cast_and_a_constant_read_in_both_types_is_kept_twice():
    nodes = [("Mul", "x c", "a", {}), ("Sigmoid", "a", "s", {}), ("Mul", "s c", "y", {})]
    model = graph(nodes, {"x": [5]}, {"y": [5]}, c=np.float32([0.1, 0.2, 0.3, 0.4, 0.5]))
    x = np.linspace(-2, 2, 5)
    wide = run(model.SerializeToString(), x=x)["y"]
    half, report = to_half(model)
    assert list(report.float32) == ["n1", "n2"]
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert types == {"c": TensorProto.FLOAT16, "c_float32": TensorProto.FLOAT}
    assert [o.name for o in half.graph.output] == ["y"]
    narrow = run(half.SerializeToString(), x=x)["y"]
    assert narrow.dtype == np.float16
    assert distance(narrow, wide) < 1e-3


def test_scales_of_a_resize_stay_float32():
    nodes = [("Resize", "x  s", "y", {"mode": "nearest"})]
    model = graph(nodes, {"x": [1, 1, 2, 2]}, {"y": [1, 1, 4, 4]}, s=np.float32([1, 1, 2, 2]))
    model.graph.node[0].input[:] = ["x", "", "s"]
    half, _ = to_half(model)
    assert {t.name: t.data_type for t in half.graph.initializer} == {"s_float32": TensorProto.FLOAT}
    assert run(half.SerializeToString(), x=np.ones((1, 1, 2, 2)))["y"].shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [(7e4, r"a\.onnx: c reaches 7e\+04"), (np.nan, r"a\.onnx: c holds NaN"), (-np.inf, r"a\.onnx: c holds NaN or inf")],
)
def test_constants_beyond_the_range(value, message):
    model = graph([("Mul", "x c", "y", {})], {"x": [2]}, {"y": [2]}, c=np.float32([1, value]))
    with pytest.raises(QuantizationError, match=message):
        check_half_range(model, "a.onnx")


def test_the_largest_number_and_ranges_of_activations():
    check_half_range(graph([("Mul", "x c", "y", {})], {"x": [1]}, {"y": [1]}, c=np.float32([65504])), "a.onnx")
    weight = np.ones((4, 4), np.float32)
    check_half_range(quantised_product(weight, np.full(4, 0.01, np.float32), 65000 / 127), "a.onnx")
    with pytest.raises(QuantizationError, match=r"a\.onnx: the range of x reaches"):
        check_half_range(quantised_product(weight, np.full(4, 0.01, np.float32), 600.0), "a.onnx")
