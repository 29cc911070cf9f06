"""Quantised layers in the right places, sharing what they should."""

import logging

import pytest
import torch
from absl import logging as absl_logging
from torch import nn

from lean import quantize
from lean.bevfusion_recipe import default_recipe
from lean.errors import QuantizationError
from lean.insert import insert_branch, insert_quantizers
from lean.recipe import BranchRecipe, LayerRule, Recipe, ShareRule
from lean.sharing import sharing_groups
from lean.switches import named_quantizers, quantized_layers
from tests.lean.tiny import Add, ConvModule, TinyFusion, batch, run


@pytest.fixture
def model():
    return TinyFusion()


def branch(*patterns: str, **changes) -> BranchRecipe:
    return BranchRecipe("decoder", tuple(map(LayerRule, patterns)), **changes)


def test_default_recipe_quantises_all_but_head_and_downsample(model):
    kinds = (nn.Conv2d, nn.ConvTranspose2d, Add)
    dense = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    float_layers = {name for name in dense if ".downsample.0" in name and "vtransform" in name}
    done = insert_quantizers(model, default_recipe(model))
    assert set(done.quantised) == set(quantized_layers(model))
    assert done.left_float == {}
    assert dense - set(done.quantised) == float_layers == {"encoders.camera.vtransform.downsample.0"}
    assert "encoders.lidar.backbone.encoder_layers.encoder_layer1.1.0" in done.quantised
    assert {"encoders.camera.neck.concats.0", "encoders.camera.neck.concats.1"} <= set(done.quantised)


def test_the_scripts_functions_do_the_same(model):
    insert_quantizers(model, default_recipe(model))
    other = TinyFusion()
    quantize.initialize()
    quantize.quantize_encoders_lidar_branch(other.encoders["lidar"]["backbone"])
    quantize.quantize_encoders_camera_branch(other.encoders["camera"])
    quantize.replace_to_quantization_module(other.fuser)
    quantize.quantize_decoder(other.decoder)
    assert list(quantized_layers(other)) == list(quantized_layers(model))
    assert sharing_groups(other) == sharing_groups(model)


def test_sharing_groups(model):
    insert_quantizers(model, default_recipe(model))
    groups = {tuple(name.removeprefix("encoders.camera.") for name in group) for group in sharing_groups(model)}
    blocks = {(f"backbone.layer{k}.{j}.conv1", f"backbone.layer{k}.{j}.add") for k in range(1, 5) for j in (0, 1)}
    strided = {f"backbone.layer{k}.0" for k in (2, 3, 4)}
    expected = {pair for pair in blocks if pair[0].removesuffix(".conv1") not in strided}
    expected.add(("backbone.layer2.0.conv1", "backbone.layer2.0.downsample.0"))
    for level, stage in ((0, 3), (1, 4)):
        first = f"backbone.layer{stage}.0"
        lateral = f"neck.lateral_convs.{level}.conv", f"neck.concats.{level}"
        expected.add((f"{first}.conv1", f"{first}.downsample.0", *lateral))
    assert groups == expected


def test_identity_alone_is_quantised_in_the_camera_and_both_inputs_in_the_lidar_branch(model):
    insert_quantizers(model, default_recipe(model))
    layers = quantized_layers(model)
    assert layers["encoders.camera.backbone.layer1.0.add"].inputs == "second"
    assert layers["encoders.lidar.backbone.encoder_layers.encoder_layer1.0.add"].inputs == "all"


def test_torch_stays_unpatched(model):
    quantize.initialize()
    quantize.quantize_decoder(model.decoder)
    assert type(nn.Conv2d(1, 1, 1)).__module__ == "torch.nn.modules.conv"
    assert type(nn.Linear(1, 1)).__module__ == "torch.nn.modules.linear"


def test_initialize_silences_the_library_alone(caplog):
    quantize.initialize()
    absl_logging.warning("a line for every quantizer")
    logging.getLogger("lean").warning("something the user must know")
    assert [record.getMessage() for record in caplog.records] == ["something the user must know"]


def test_keep_float_and_other_kinds_are_listed(model, caplog):
    model.decoder.extra = nn.Conv1d(1, 1, 1)
    done = insert_branch(model.decoder, branch("*", keep_float=("neck.deblocks.0.*",)))
    assert done.left_float == {
        "neck.deblocks.0.0": "the recipe keeps it float",
        "extra": "Conv1d has no INT8 form",
    }
    assert type(model.decoder.neck.deblocks[0][0]) is nn.Conv2d
    assert "neck.deblocks.1.0" in done.quantised
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["decoder.extra stays float: Conv1d has no INT8 form"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            branch("neck.deblok.*"),
            "rule of branch 'decoder': 'neck.deblok.\\*' matched no module; nearest: 'neck.deblocks'",
        ),
        (branch("neck.deblocks.?.1"), "rule 'neck.deblocks.\\?.1' of branch 'decoder' fits no layer"),
        (branch("*", keep_float=("nek",)), "keep_float of branch 'decoder': 'nek' matched no module; nearest: 'neck'"),
        (branch("*", share=(ShareRule("backbone.blocks.9.0", ()),)), "share rule 'backbone.blocks.9.0' matched no"),
        (
            branch("*", share=(ShareRule("backbone.blocks.{i}.0", ("neck.deblocks.{i}.1",)),)),
            "share rule's follower 'neck.deblocks.0.1' matched no module",
        ),
    ],
)
def test_rules_that_fit_nothing_are_refused(model, rules, message):
    with pytest.raises(QuantizationError, match=message):
        insert_branch(model.decoder, rules)


def test_a_missing_branch_is_named(model):
    with pytest.raises(QuantizationError, match="branch 'decoderr' matched no module; nearest: 'decoder'"):
        insert_quantizers(model, Recipe((BranchRecipe("decoderr", (LayerRule("*"),)),)))


def test_quantising_twice_is_refused(model):
    quantize.quantize_decoder(model.decoder)
    with pytest.raises(QuantizationError, match="it is quantised already"):
        quantize.quantize_decoder(model.decoder)


def test_sharing_brings_whole_groups_along():
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(4)))
    share = (ShareRule("2", ("3",)), ShareRule("1", ("2",)), ShareRule("0", ("1",)))
    insert_branch(model, BranchRecipe("x", (LayerRule("*"),), share))
    assert len({conv._input_quantizer for conv in model}) == 1
    assert len(named_quantizers(model)) == 5


def test_unless_keeps_a_rule_away():
    model = nn.ModuleDict({name: nn.ModuleDict({"conv1": nn.Conv2d(1, 1, 1), "add": Add()}) for name in "ab"})
    model["b"]["downsample"] = nn.Conv2d(1, 1, 1)
    rule = ShareRule("{block}.conv1", ("{block}.add",), unless=("{block}.downsample*",))
    insert_branch(model, BranchRecipe("x", (LayerRule("*"),), (rule,)))
    assert sharing_groups(model) == [["a.conv1", "a.add"]]


def test_swin_backbone_quantises_its_linears_and_shares_in_the_neck():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

    camera = nn.ModuleDict(
        {
            "backbone": nn.ModuleDict({"patch_embed": nn.Conv2d(3, 4, 4, 4), "stages": nn.ModuleList([Attention()])}),
            "neck": TinyFusion().encoders["camera"]["neck"],
            "vtransform": nn.ModuleDict({"depthnet": nn.Conv2d(4, 4, 1), "downsample": ConvModule(4, 4, 1)}),
        }
    )
    done = quantize.quantize_encoders_camera_branch(camera)
    assert {"backbone.patch_embed", "backbone.stages.0.qkv", "backbone.stages.0.proj"} <= set(done.quantised)
    assert "vtransform.depthnet" in done.quantised
    assert not any("downsample" in name for name in done.quantised)
    assert sharing_groups(camera) == [[f"neck.lateral_convs.{i}.conv", f"neck.concats.{i}"] for i in (0, 1)]


def test_forward_is_unchanged_while_quantisation_is_off(model):
    expected = run(model, batch())
    insert_quantizers(model, default_recipe(model))
    with quantize.disable_quantization(model):
        assert torch.equal(run(model, batch()), expected)
