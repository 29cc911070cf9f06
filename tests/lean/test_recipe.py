"""The recipe as data: validation, and the way to plain dictionaries and back."""

import json

import pytest

from lean.bevfusion_recipe import camera_branch, default_recipe
from lean.errors import QuantizationError
from lean.recipe import BranchRecipe, LayerRule, QuantizerSpec, Recipe, ShareRule
from tests.lean.tiny import TinyFusion


def minimal(**changes) -> dict:
    return {"branches": [{"path": "decoder", "quantize": [{"pattern": "*"}]}], **changes}


def test_default_recipe_survives_json():
    recipe = default_recipe(TinyFusion())
    assert [branch.path for branch in recipe.branches] == [
        "encoders.camera",
        "encoders.lidar.backbone",
        "fuser",
        "decoder",
    ]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_default_recipe_has_only_the_branches_of_the_model():
    model = TinyFusion()
    del model.encoders["camera"]
    del model.fuser
    recipe = default_recipe(model)
    assert [branch.path for branch in recipe.branches] == ["encoders.lidar.backbone", "decoder"]
    assert recipe.disable == ("encoders.lidar.backbone.conv_input.*", "decoder.neck.deblocks.0.0")


def test_weights_are_calibrated_by_their_maximum():
    recipe = Recipe.from_dict(minimal())
    assert recipe.activation == QuantizerSpec(8, "histogram", unsigned=False, narrow_range=False)
    assert recipe.weight == QuantizerSpec(8, "max", unsigned=False, narrow_range=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"brunches": []}, "recipe: unknown key 'brunches'; known: branches, disable"),
        ({"activation": {"num_bits": 99}}, "num_bits must be one of 2, .*, got 99"),
        ({"activation": {"num_bits": "8"}}, "recipe.activation.num_bits: expected int, got '8'"),
        ({"weight": {"calibrator": "histogram"}}, "calibrator of weights must be one of 'max'"),
        ({"disable": "decoder"}, "recipe.disable: expected a list, got str"),
        ({"transposed_axis": 2}, "transposed_axis must be one of 0, 1"),
        ({"branches": [{"path": "a"}]}, r"recipe.branches\[0\].*'quantize'"),
        ({"branches": [{"path": "a", "quantize": []}]}, "branch 'a' has no rule"),
        ({"branches": [{"path": "a", "quantize": [{"pattern": "*", "inputs": "first"}]}]}, "rule '\\*'.*'first'"),
        ({"branches": minimal()["branches"] * 2}, "two branches have the same path"),
        ({"branches": [7]}, r"recipe.branches\[0\]: expected a mapping, got int"),
    ],
)
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(QuantizationError, match=message):
        Recipe.from_dict(minimal(**changes))


def test_a_follower_can_use_only_the_leaders_words():
    with pytest.raises(QuantizationError, match="uses a word the leader has not"):
        ShareRule("layer{k}.conv1", ("layer{k}.{j}.conv2",))


def test_neck_sharing_follows_the_stages_that_reach_the_neck():
    def neck(branch: BranchRecipe) -> set[tuple[str, str]]:
        return {(rule.leader, rule.followers[0]) for rule in branch.share if "neck" in rule.followers[0]}

    usual = neck(camera_branch())
    assert ("backbone.layer3.0.conv1", "neck.lateral_convs.0.conv") in usual
    assert ("neck.lateral_convs.1.conv", "neck.concats.1") in usual
    assert ("backbone.layer2.0.conv1", "neck.lateral_convs.0.conv") in neck(camera_branch((0, 1, 2, 3)))
    assert ("backbone.layer3.0.conv1", "neck.lateral_convs.0.conv") in neck(camera_branch((0, 1, 2, 3), start_level=1))


def test_rules_are_values():
    assert LayerRule("a") == LayerRule.from_dict({"pattern": "a"})
    assert len({ShareRule("a", ("b",)), ShareRule("a", ("b",))}) == 1


def test_methods_are_data():
    rules = [{"pattern": "encoders.camera.vtransform.*", "method": "entropy"}]
    recipe = Recipe.from_dict(minimal(methods=rules))
    assert recipe.method_table() == {"*": "mse", "encoders.camera.vtransform.*": "entropy"}
    assert Recipe.from_dict(minimal()).method_table() == {"*": "mse"}
    with pytest.raises(QuantizationError, match=r"method of 'decoder\.\*' must be one of 'mse', .* got 'kl'"):
        Recipe.from_dict(minimal(methods=[{"pattern": "decoder.*", "method": "kl"}]))
