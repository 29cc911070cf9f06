"""Signal-to-noise ratios of layers and of parts of the network."""

import copy
import math

import pytest
import torch

from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights, observe, observing
from lean.errors import QuantizationError
from lean.insert import insert_quantizers
from lean.ranges import set_amax
from lean.sqnr import Noise, measure_noise, noise_between, output_module
from lean.switches import disable_layers, disable_quantization, named_quantizers, quantized_layers
from tests.lean.tiny import TinyFusion, batch, run

BRANCHES = {
    "encoders.camera": "encoders.camera.vtransform",
    "encoders.lidar.backbone": "encoders.lidar.backbone",
    "fuser": "fuser",
    "decoder": "decoder",
}


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    model = TinyFusion()
    insert_quantizers(model, default_recipe(model))
    calibrate_weights(model)
    with observing(model) as observers:
        observe(model, [batch(0), batch(1)], 2, run)
    set_amax(model, observers.statistics())
    return model


def measure(model, batches=(0,), **options):
    return measure_noise(model, [batch(seed) for seed in batches], run, **options)


def test_ratio_of_known_noise():
    signal = torch.full((1000,), 2.0)
    found = noise_between({"a": [signal, signal]}, {"a": [signal + 0.02, signal - 0.02]})
    assert found.sqnr_db == pytest.approx(40, abs=1e-3)
    assert found.relative == pytest.approx(0.01, rel=1e-3)
    assert (found + found).sqnr_db == pytest.approx(found.sqnr_db)
    assert Noise(1, 0).sqnr_db == math.inf
    assert Noise(0, 1).sqnr_db == -math.inf
    assert math.isnan(noise_between(signal, signal * math.nan).sqnr_db)


def test_a_long_sum_of_small_squares_keeps_its_digits():
    signal = torch.full((2**24 + 2**22,), 0.1)  # float32 would stop adding
    expected = signal.numel() * float(signal[0]) ** 2
    assert noise_between(signal, signal).signal == pytest.approx(expected, rel=1e-9)


def test_layers_are_measured_on_their_float_input_and_outputs_on_what_reaches_them(calibrated):
    """Against both networks, run by hand."""
    seen = {}

    def keep(name):
        def hook(layer, inputs, output):
            seen[name] = [x.clone() for x in inputs], output.clone()

        return hook

    names = ("fuser.0", "encoders.camera.backbone.layer1.1.add")
    layers = {name: calibrated.get_submodule(name) for name in names}
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    with disable_quantization(calibrated):
        plain = run(calibrated, batch())
    for handle in handles:
        handle.remove()
    found = measure(calibrated, outputs=["head"])
    for name, layer in layers.items():
        inputs, output = seen[name]
        expected = noise_between(output, layer(*inputs))
        assert expected.noise > 0
        assert found.layers["both"][name].noise == pytest.approx(expected.noise, rel=1e-6)
    whole = noise_between(plain, run(calibrated, batch()))
    assert found.outputs["head"].noise == pytest.approx(whole.noise, rel=1e-6)


def test_every_layer_and_branch_of_the_model_is_measured_and_batches_add_up(calibrated):
    outputs = {branch: output_module(calibrated, branch) for branch in BRANCHES}
    assert outputs == BRANCHES
    one, other, both = (measure(calibrated, seeds, outputs=list(outputs.values())) for seeds in ((0,), (1,), (0, 1)))
    assert list(both.layers["both"]) == list(quantized_layers(calibrated))
    assert both.batches == 2
    for name, noise in {**both.layers["both"], **both.outputs}.items():
        a, b = ({**part.layers["both"], **part.outputs}[name] for part in (one, other))
        assert 5 < noise.sqnr_db < 90, name
        assert noise.noise == pytest.approx(a.noise + b.noise, rel=1e-9)


def test_parts(calibrated):
    found = measure(calibrated, parts=("both", "inputs", "weights")).layers
    joins = {name for name, layer in quantized_layers(calibrated).items() if len(layer.quantizers) == 1}
    assert set(found["both"]) - set(found["weights"]) == joins != set()
    assert set(found["inputs"]) == set(found["both"])
    for name, noise in found["weights"].items():  # independent rounding: the powers add up, roughly
        assert noise.noise + found["inputs"][name].noise == pytest.approx(found["both"][name].noise, rel=0.5)


def test_disabled_layers_are_left_out_unless_they_are_named(calibrated):
    model = copy.deepcopy(calibrated)
    disable_layers(model, ["fuser.0"])
    assert "fuser.0" not in measure(model).layers["both"]
    named = measure(model, layers=["fuser.0"]).layers["both"]
    assert named == {"fuser.0": measure(calibrated).layers["both"]["fuser.0"]}


def test_a_module_called_twice_is_counted_twice(calibrated):
    twice = measure_noise(calibrated, [batch()], lambda m, one: (run(m, one), run(m, one)), outputs=["fuser"])
    once = measure(calibrated, outputs=["fuser"])
    assert twice.layers["both"]["fuser.0"].noise == pytest.approx(2 * once.layers["both"]["fuser.0"].noise)
    assert twice.outputs["fuser"].noise == pytest.approx(2 * once.outputs["fuser"].noise)


def test_the_model_and_its_inputs_are_left_as_they_were(calibrated):
    model = copy.deepcopy(calibrated)
    model.train()
    disable_layers(model, ["fuser.0"])
    before = [(m.training, getattr(m, "_disabled", None)) for m in model.modules()]
    one, amax = batch(), [q.amax.clone() for q in named_quantizers(model).values()]
    measure_noise(model, [one], run, outputs=["fuser"])
    assert torch.equal(one.images, batch().images)
    assert torch.equal(one.voxels[0], batch().voxels[0])

    def fails(model, one):
        run(model, one)
        raise KeyError

    with pytest.raises(KeyError):
        measure_noise(model, [one], fails, outputs=["fuser"])
    assert [(m.training, getattr(m, "_disabled", None)) for m in model.modules()] == before
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(q.amax, a) for q, a in zip(named_quantizers(model).values(), amax, strict=True))


def test_bad_requests(calibrated):
    with pytest.raises(QuantizationError, match=r"'fusser'.*nearest: 'fuser'"):
        measure(calibrated, outputs=["fusser"])
    with pytest.raises(QuantizationError, match=r"'fuser\.1'.*nearest: 'fuser\.0'"):
        measure(calibrated, layers=["fuser.1"])
    with pytest.raises(QuantizationError, match="'weight': choose from both"):
        measure(calibrated, parts=["weight"])
    model = TinyFusion()
    insert_quantizers(model, default_recipe(model))
    with pytest.raises(QuantizationError, match="calibrate the model"):
        measure(model)
