"""Recipes as files: what is written is read again, and what can't be used is named."""

import argparse
import dataclasses

import pytest

from lean.bevfusion_recipe import default_recipe
from lean.errors import QuantizationError
from lean.insert import insert_quantizers
from lean.recipe import MethodRule
from qat.calibration import check_disable
from qat.recipes import check_methods, choose_recipe, save_recipe, with_options
from tests.lean.tiny import TinyFusion

LAYER1 = "encoders.camera.backbone.layer1.0"


@pytest.fixture(scope="module")
def model() -> TinyFusion:
    return TinyFusion()


def test_a_written_recipe_is_read_again(model, tmp_path):
    recipe = default_recipe(model)
    other = dataclasses.replace(
        recipe, disable=(*recipe.disable, "fuser.0"), methods=(MethodRule("fuser.*", "max"),), transposed_axis=1
    )
    save_recipe(other, tmp_path / "r.yaml", "two lines\nof comment: [")
    assert choose_recipe(tmp_path / "r.yaml", model) == other
    assert choose_recipe(None, model) == recipe
    assert (tmp_path / "r.yaml").read_text().startswith("# two lines\n# of comment: [\nbranches:\n")


def test_what_a_file_leaves_out_is_the_defaults(model, tmp_path):
    recipe = default_recipe(model)
    (tmp_path / "r.yaml").write_text("disable: [fuser.0]\n")
    assert choose_recipe(tmp_path / "r.yaml", model) == dataclasses.replace(recipe, disable=("fuser.0",))
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    assert choose_recipe(tmp_path / "r.yaml", model) == recipe


def test_options_become_part_of_the_recipe(model):
    recipe = default_recipe(model)
    changed = with_options(recipe, argparse.Namespace(disable=["fuser.0"], method="max"))
    assert changed.disable == (*recipe.disable, "fuser.0")
    assert set(changed.method_table().values()) == {"max"}
    assert with_options(recipe, argparse.Namespace(disable=[], method=None)) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1, 2\nb: }", ["r.yaml", "is not YAML"]),
        ("- fuser.0\n", ["r.yaml", "expected a mapping, got list"]),
        ("disabled: []\n", ["r.yaml", "unknown key 'disabled'", "disable"]),
        ("disable: fuser.0\n", ["r.yaml.disable", "expected a list"]),
        ("branches: []\nactivation: {num_bits: 40}\n", ["num_bits", "40"]),
        ("methods:\n- {pattern: fuser.*, method: mean}\n", ["'fuser.*'", "mse", "'mean'"]),
        ("methods:\n- {pattern: fusser.*, method: max}\n", ["'fusser.*'", "nearest: 'fuser'"]),
        ("disable: [fusser.0]\n", ["'fusser.0'", "nearest: 'fuser.0'"]),
        (f"disable: [{LAYER1}.conv1]\n", [f"{LAYER1}.conv1 shares its input scale with {LAYER1}.add"]),
    ],
)
def test_recipes_that_can_not_be_used(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(QuantizationError) as error:
        model = TinyFusion()
        recipe = choose_recipe(tmp_path / "r.yaml", model)
        insert_quantizers(model, recipe)
        check_methods(model, recipe)
        check_disable(model, recipe, [])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(QuantizationError, match=r"--recipe .*none.yaml: No such file"):
        choose_recipe(tmp_path / "none.yaml", model)
