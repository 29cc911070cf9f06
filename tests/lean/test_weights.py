"""amax of weights: the right axis, the largest value or the least error."""

import numpy as np
import pytest
import torch
from pytorch_quantization.calib import MaxCalibrator
from pytorch_quantization.tensor_quant import fake_tensor_quant

from lean.errors import QuantizationError
from lean.weights import OCTAVES, STEPS_PER_OCTAVE, weight_amax

SHAPES = {
    "conv": ((8, 5, 3, 3), 0),
    "transposed conv": ((5, 8, 2, 2), 1),
    "linear": ((8, 13), 0),
    "spconv 1": ((3, 3, 3, 5, 8), 4),
    "spconv 2": ((8, 3, 3, 3, 5), 0),
    "negative axis": ((3, 3, 8), -1),
    "whole tensor": ((4, 3, 2), None),
}


def weight(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3


@pytest.mark.parametrize("name", SHAPES)
def test_max_equals_the_library(name):
    shape, axis = SHAPES[name]
    calibrator = MaxCalibrator(8, axis if axis is None or axis >= 0 else axis + len(shape), False)
    calibrator.collect(weight(shape))
    expected = calibrator.compute_amax()
    amax = weight_amax(weight(shape), axis)
    assert torch.equal(amax, expected)
    assert amax.shape == expected.shape


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_bits", [8, 4])
def test_mse_is_the_best_candidate_of_each_channel(name, num_bits):
    shape, axis = SHAPES[name]
    values = weight(shape)
    amax = weight_amax(values, axis, "mse", num_bits=num_bits)
    channels = [values] if axis is None else values.unbind(axis)
    for channel, chosen in zip(channels, amax.reshape(-1), strict=True):
        candidates = channel.abs().max() * 2.0 ** (-torch.arange(OCTAVES * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)
        errors = [((fake_tensor_quant(channel, a, num_bits, False, False) - channel) ** 2).sum() for a in candidates]
        error = ((fake_tensor_quant(channel, chosen, num_bits, False, False) - channel) ** 2).sum()
        assert error <= min(errors) * (1 + 1e-5)
    assert (amax <= weight_amax(values, axis)).all()


def test_a_channel_of_zeros_has_amax_zero():
    values = weight((3, 4))
    values[1] = 0
    for method in ("max", "mse"):
        amax = weight_amax(values, 0, method)
        assert amax[1] == 0
        assert (amax[[0, 2]] > 0).all()


def test_half_precision_and_gradients_are_taken_as_they_come():
    values = weight((4, 6)).half()
    assert weight_amax(values, 0).dtype == torch.float32
    assert torch.equal(weight_amax(values, 0), values.float().abs().amax(1, keepdim=True))
    assert not weight_amax(values.float().requires_grad_(), 0, "mse").requires_grad


def test_bad_weights_and_methods_are_refused():
    with pytest.raises(QuantizationError, match=r"shape \(2, 2\) holds NaN or infinity"):
        weight_amax(torch.tensor([[1.0, np.nan], [0, 0]]), 0)
    with pytest.raises(QuantizationError, match="unknown method 'entropy' for weights: choose max or mse"):
        weight_amax(torch.ones(2, 2), 0, "entropy")
