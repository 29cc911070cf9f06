"""Fake quantisation against the reference's outputs."""

import json

import numpy as np
import pytest
import torch
from pytorch_quantization.nn import TensorQuantizer

from lean.quantizer import Quantizer
from lean.recipe import QuantizerSpec


@pytest.fixture(scope="module")
def units(golden):
    return json.loads((golden / "quantizer_units.json").read_text()), np.load(golden / "quantizer_units.npz")


@pytest.fixture
def torch_native():
    """Let quantizers use torch's own fake quantisation, as ONNX export does."""
    TensorQuantizer.use_fb_fake_quant = True
    yield
    TensorQuantizer.use_fb_fake_quant = False


def quantise(x: np.ndarray, amax: float | np.ndarray, axis: int | None = None, **spec) -> np.ndarray:
    quantizer = Quantizer(QuantizerSpec(calibrator="histogram" if axis is None else "max", **spec), axis)
    quantizer.set_amax(torch.as_tensor(amax, dtype=torch.float32))
    return quantizer(torch.from_numpy(x)).numpy()


def test_per_tensor(units):
    table, arrays = units
    for i, case in enumerate(table["fq"]):
        np.testing.assert_array_equal(quantise(arrays["fq/x"], case["amax"]), arrays[f"fq/{i}/out"], str(case))
    assert len(table["fq"]) == 8


def test_per_tensor_torch_native(units, torch_native):
    table, arrays = units
    for i, case in enumerate(table["fq"]):
        np.testing.assert_array_equal(quantise(arrays["fq/x"], case["amax"]), arrays[f"fq/{i}/out_fb"], str(case))


def test_ties_and_range(units):
    _, arrays = units
    x = arrays["fq_ties/x"]
    np.testing.assert_array_equal(quantise(x, 127.0), arrays["fq_ties/out_amax127"])
    np.testing.assert_array_equal(quantise(x, 127.0, narrow_range=True), arrays["fq_ties/out_amax127_narrow"])
    np.testing.assert_array_equal(quantise(x, 60.0), arrays["fq_ties/out_amax60"])
    np.testing.assert_array_equal(quantise(abs(x), 60.0, unsigned=True), arrays["fq_ties/out_unsigned_amax60"])


def test_nan_amax_gives_nan(units):
    _, arrays = units
    np.testing.assert_array_equal(quantise(arrays["fq/x"], float("nan")), arrays["fq/nan_amax"])


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel(units, axis):
    _, arrays = units
    w, amax = arrays["pc/w"], arrays[f"pc/axis{axis}/amax"]
    np.testing.assert_array_equal(abs(w).max(tuple({0, 1, 2, 3} - {axis}), keepdims=True), amax)
    np.testing.assert_array_equal(quantise(w, amax, axis), arrays[f"pc/axis{axis}/out"])


def test_per_channel_torch_native(units, torch_native):
    _, arrays = units
    for axis in (0, 1):
        out = quantise(arrays["pc/w"], arrays[f"pc/axis{axis}/amax"], axis)
        np.testing.assert_array_equal(out, arrays[f"pc/axis{axis}/out_fb"])


def test_per_channel_of_five_dimensions(units):
    _, arrays = units
    np.testing.assert_array_equal(quantise(arrays["pc5/w"], arrays["pc5/amax"], 4), arrays["pc5/out"])
    ours = quantise(arrays["pc5/w"].transpose(4, 0, 1, 2, 3), arrays["pc5/amax"].transpose(4, 0, 1, 2, 3), 0)
    np.testing.assert_array_equal(ours, arrays["pc5/out"].transpose(4, 0, 1, 2, 3))


def test_without_amax_the_range_is_that_of_the_tensor(units):
    _, arrays = units
    out = Quantizer(QuantizerSpec(calibrator="max"), 0)(torch.from_numpy(arrays["pc/w"]))
    np.testing.assert_array_equal(out.numpy(), arrays["pc/dynamic_no_amax_axis0"])


def test_empty_tensor_passes():
    quantizer = Quantizer(QuantizerSpec())
    quantizer.set_amax(torch.tensor(1.0))
    quantizer._if_calib = True
    assert quantizer(torch.empty(0, 16)).shape == (0, 16)


def test_state_dict_brings_its_amax_along_without_cuda():
    source, target = Quantizer(QuantizerSpec(calibrator="max"), 0), Quantizer(QuantizerSpec(calibrator="max"), 0)
    source.set_amax(torch.tensor([[1.0], [2.0]]))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.amax, source.amax, rtol=0, atol=0)
    source.set_amax(torch.tensor([[3.0], [4.0]]))
    target.load_state_dict(source.state_dict())
    assert target.amax.flatten().tolist() == [3.0, 4.0]


def test_gradient_passes_inside_the_range_only():
    x = torch.tensor([-3.0, -1.0, 0.5, 2.5], requires_grad=True)
    quantizer = Quantizer(QuantizerSpec())
    quantizer.set_amax(torch.tensor(2.0))
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
