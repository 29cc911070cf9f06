"""One layer quantised, or all but one: equal to whole forwards bit for bit, exact names, nothing left behind."""

import pytest
import torch
from torch import nn

from lean.bevfusion_recipe import default_recipe
from lean.errors import QuantizationError
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.quantize import calibrate_model, replace_to_quantization_module
from lean.sensitivity import Trial, Unit, plan_trials, run_trials, sensitivity_units, unit_quantizers
from lean.sqnr import noise_between
from lean.switches import disable_layers, named_quantizers, quantized_layers, quantizer_flags
from tests.lean import tiny
from tests.lean.test_replay import state

OUTPUTS = {"camera": "encoders.camera", "lidar": "encoders.lidar", "fused": "fuser", "decoder": "decoder"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A calibrated `TinyFusion` with the recipe's layers left in float, whose signals keep their size."""
    torch.manual_seed(0)
    model = tiny.TinyFusion()
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    fold_dense(model)
    fold_sparse(model)
    for layer in quantized_layers(model).values():
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
    calibrate_model(model, [tiny.batch(), tiny.batch(1)], "cpu", tiny.run, 2)
    disable_layers(model, recipe.disable)
    return model


def run_naively(model: nn.Module, one, trial: Trial, part: str = "both") -> torch.Tensor:
    """The whole forward of a trial, with the quantizers switched by hand."""
    units = sensitivity_units(model)
    own, every = unit_quantizers(model, units, part), named_quantizers(model).values()
    unit, on = set(own.get(trial.unit, ())), set()
    if trial.kind in ("int8", "without"):
        on = {q for quantizers in own.values() for q in quantizers if not q._disabled}
    on = on - unit if trial.kind == "without" else on | unit
    with quantizer_flags(every, _disabled=True), quantizer_flags(on, _disabled=False):
        return tiny.run(model, one)


@pytest.mark.parametrize("part", ["both", "inputs", "weights"])
def test_every_trial_equals_a_whole_forward_bit_for_bit(model, part):
    one, found = tiny.batch(2), []
    units = sensitivity_units(model, part=part)
    run_trials(model, lambda: model(one.images, one.voxels), units, found.append, outputs=OUTPUTS, part=part)
    assert [outcome.trial for outcome in found] == plan_trials(units)
    for outcome in found:
        assert torch.equal(outcome.result, run_naively(model, one, outcome.trial, part)), outcome.trial
    different = {outcome.result.sum().item() for outcome in found}
    assert len(different) > 0.9 * len(found)  # the trials are not all one forward


def test_noise_is_that_of_the_whole_forwards(model):
    one, found, kept = tiny.batch(2), [], {}
    units = sensitivity_units(model, ["encoders.camera.vtransform.*", "decoder.backbone.blocks.1.0"])
    run_trials(model, lambda: model(one.images, one.voxels), units, found.append, outputs=OUTPUTS)
    noise = {str(outcome.trial): outcome.noise for outcome in found}
    assert set(noise["float"]) == set(OUTPUTS)
    assert all(value.noise == 0 for value in noise["float"].values())
    alone = noise["alone:encoders.camera.vtransform.depthnet.0"]
    assert alone["camera"].noise > 0
    assert alone["lidar"].noise == 0
    assert noise["alone:decoder.backbone.blocks.1.0"]["fused"].noise == 0
    assert noise["without:encoders.camera.vtransform.depthnet.0"]["lidar"] == noise["int8"]["lidar"]
    for name in ("float", "int8"):
        hook = model.fuser.register_forward_hook(lambda _, __, output, name=name: kept.update({name: output.clone()}))
        run_naively(model, one, Trial(name))
        hook.remove()
    assert noise["int8"]["fused"] == noise_between(kept["float"], kept["int8"])


def test_units_are_sharing_groups(model):
    units = {unit.name: unit for unit in sensitivity_units(model)}
    names = [name for unit in units.values() for name in unit.layers]
    assert sorted(names) == sorted(quantized_layers(model))
    backbone, neck = "encoders.camera.backbone", "encoders.camera.neck"
    assert units[f"{backbone}.layer3.0.conv1"].layers == (
        f"{backbone}.layer3.0.conv1",
        f"{backbone}.layer3.0.downsample.0",
        f"{neck}.lateral_convs.0.conv",
        f"{neck}.concats.0",
    )
    assert [unit.name for unit in units.values() if unit.left_float] == [
        "encoders.lidar.backbone.conv_input.0",
        "decoder.neck.deblocks.0.0",
    ]
    assert Trial("without", "decoder.neck.deblocks.0.0") not in plan_trials(units.values())
    assert Trial("alone", "decoder.neck.deblocks.0.0") in plan_trials(units.values())
    joins = [unit for unit in sensitivity_units(model) if unit not in sensitivity_units(model, part="weights")]
    assert joins
    assert all(unit.layers[0].endswith(".add") for unit in joins)


def test_a_glob_for_a_member_selects_its_group(model):
    found = sensitivity_units(model, ["encoders.camera.neck.concats.0"])
    assert [unit.name for unit in found] == ["encoders.camera.backbone.layer3.0.conv1"]


def test_names_are_never_taken_for_parts_of_others():
    model = nn.ModuleDict({f"layer{i}": nn.Conv2d(1, 1, 1) for i in (1, 10, 11)})
    replace_to_quantization_module(model)
    assert sensitivity_units(model, ["layer1"]) == [Unit("layer1", ("layer1",))]
    own = unit_quantizers(model, sensitivity_units(model, ["layer1"]))
    assert own == {"layer1": list(model["layer1"].quantizers)}


def test_only_some_trials_run(model):
    one, found, forwards = tiny.batch(), [], []

    def forward() -> torch.Tensor:
        forwards.append(1)
        return model(one.images, one.voxels)

    units = sensitivity_units(model, ["fuser.0", "decoder.backbone.*"])
    wanted = {Trial("without", "fuser.0")}
    run_trials(model, forward, units, found.append, trials=wanted)
    assert [outcome.trial for outcome in found] == [Trial("without", "fuser.0")]
    assert len(forwards) == 3  # float, INT8, and this one
    run_trials(model, forward, units, found.append, trials=())
    assert len(forwards) == 3


def test_the_model_is_as_before(model):
    one, before, wanted = tiny.batch(), state(model), tiny.run(model, tiny.batch())
    run_trials(model, lambda: model(one.images, one.voxels), sensitivity_units(model, ["decoder.*"]), lambda _: None)
    assert state(model) == before
    assert torch.equal(tiny.run(model, one), wanted)

    def stop(outcome) -> None:
        if outcome.trial.kind == "without":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trials(model, lambda: model(one.images, one.voxels), sensitivity_units(model, ["decoder.*"]), stop)
    assert state(model) == before


def test_what_can_not_be_measured_is_named(model):
    with pytest.raises(QuantizationError, match=r"--only 'decoder\.x' matched no module; nearest: 'decoder"):
        sensitivity_units(model, ["decoder.x"])
    with pytest.raises(QuantizationError, match="unknown part 'activations': choose from both, inputs, weights"):
        sensitivity_units(model, part="activations")
    with pytest.raises(QuantizationError, match="no quantised layers"):
        sensitivity_units(nn.Conv2d(1, 1, 1))
    raw = nn.Sequential(nn.Conv2d(1, 1, 1))
    replace_to_quantization_module(raw)
    with pytest.raises(QuantizationError, match=r"no finite, positive amax in 0\._input_quantizer"):
        run_trials(raw, lambda: raw(torch.zeros(1, 1, 2, 2)), sensitivity_units(raw), lambda _: None)
    disable_layers(raw, ["0"])
    model_and_raw = nn.ModuleList([model.fuser, raw])  # calibrated but for a layer that is off
    with pytest.raises(QuantizationError, match=r"1\.0 has no amax"):
        run_trials(model_and_raw, lambda: None, [Unit("1.0", ("1.0",), True)], lambda _: None)
