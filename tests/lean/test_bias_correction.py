"""Bias correction: every layer's mean output in the quantised network becomes that in the float network."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lean.bias_correction import channel_means, correct_biases
from lean.errors import QuantizationError
from lean.switches import disable_layers, disable_quantization, quantized_layers
from tests.lean.tiny import batch, run
from tests.lean.tiny_quantised import calibrated


def means(model: nn.Module) -> dict[str, torch.Tensor]:
    """Channel means of every quantised layer with weights, in a forward of the model as it is."""
    found = {}
    with ExitStack() as hooks:
        for name, layer in quantized_layers(model).items():
            if hasattr(layer, "_weight_quantizer"):

                def keep(layer, _, output, name=name):
                    found[name] = channel_means(output, layer)

                hooks.callback(layer.register_forward_hook(keep).remove)
        run(model, batch())
    return found


def largest_shift(before: dict, after: dict) -> dict[str, float]:
    return {name: (after[name] - before[name]).abs().max().item() for name in before}


def test_means_are_those_of_the_float_network():
    model = calibrated()
    with disable_quantization(model):
        wanted = means(model)
    assert min(largest_shift(wanted, means(model)).values()) > 1e-5
    weights = {
        name: layer.weight.clone() for name, layer in quantized_layers(model).items() if hasattr(layer, "weight")
    }
    shifts = correct_biases(model, lambda: run(model, batch()))
    left = largest_shift(wanted, means(model))
    assert set(shifts) == set(left) and all(shift > 0 for shift in shifts.values())
    assert max(left.values()) < 1e-4, left
    assert all(torch.equal(quantized_layers(model)[name].weight, weight) for name, weight in weights.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_in_float_keep_their_bias_and_ones_without_get_one():
    model = calibrated()
    disable_layers(model, ["fuser.0"])
    layers = quantized_layers(model)
    bias, other = layers["fuser.0"].bias, layers["decoder.backbone.blocks.0.0"]
    with torch.no_grad():
        other.bias = None
    shifts = correct_biases(model, lambda: run(model, batch()))
    assert layers["fuser.0"].bias is bias and "fuser.0" not in shifts
    assert other.bias.abs().max().item() == pytest.approx(shifts["decoder.backbone.blocks.0.0"])


def test_it_wants_data_and_calibration():
    model = calibrated()
    nothing = batch()
    nothing.images.fill_(torch.nan)
    with pytest.raises(QuantizationError, match=r"encoders\.camera\.backbone\.conv1: the mean of its output"):
        correct_biases(model, lambda: run(model, nothing))
    with pytest.raises(QuantizationError, match="no quantizers"):
        correct_biases(nn.Conv2d(1, 1, 1), lambda: None)
