"""Recipes as YAML files: what `--recipe` reads and `--save-recipe` writes."""

import argparse
import dataclasses
import json
from pathlib import Path

import yaml
from torch import nn

from lean.bevfusion_recipe import default_recipe
from lean.distributed import rank
from lean.errors import QuantizationError
from lean.files import atomic_write
from lean.insert import Inserted, insert_quantizers
from lean.matching import select
from lean.recipe import MethodRule, Recipe
from lean.switches import named_quantizers
from qat.calibration import check_disable


def insert_by_recipe(model: nn.Module, args: argparse.Namespace) -> tuple[Recipe, Inserted]:
    """Quantise the float `model` in place as `--recipe` says, write `--save-recipe`; the recipe and what became of it.

    Raises:
        QuantizationError: the recipe can't be used, or doesn't fit the model; nothing is written then.
    """
    recipe = choose_recipe(args.recipe, model)
    inserted = insert_quantizers(model, recipe)
    check_methods(model, recipe)
    check_disable(model, recipe, args.disable)
    if args.save_recipe and rank() == 0:
        save_recipe(with_options(recipe, args), args.save_recipe)
    return recipe, inserted


def choose_recipe(path: Path | None, model: nn.Module) -> Recipe:
    """The recipe of a file, or without one the default for the float `model`.

    A file need not say everything: the keys that it lacks are the default's.

    Raises:
        QuantizationError: the file is missing, isn't YAML, or holds an unknown key or a value out of range.
    """
    default = default_recipe(model)
    if path is None:
        return default
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantizationError(f"--recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QuantizationError(f"--recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:  # an empty file, or comments alone
        return default
    if not isinstance(content, dict):
        raise QuantizationError(f"--recipe {path}: expected a mapping, got {type(content).__name__}")
    return Recipe.from_dict({**default.to_dict(), **content}, f"--recipe {path}")


def with_options(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what `--disable` and `--method` add to it or replace in it."""
    methods = (MethodRule("*", args.method),) if args.method else recipe.methods
    return dataclasses.replace(recipe, disable=(*recipe.disable, *args.disable), methods=methods)


def check_methods(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a `methods` pattern that fits no quantizer of the quantised `model`.

    Raises:
        QuantizationError: there is one; the nearest name is given.
    """
    select([rule.pattern for rule in recipe.methods], named_quantizers(model), "the recipe's methods pattern")


def save_recipe(recipe: Recipe, path: Path, comment: str = "") -> None:
    """Write `recipe` as YAML that `choose_recipe` reads, below `comment`, whole or not at all.

    Raises:
        QuantizationError: it can't be written.
    """
    plain = json.loads(json.dumps(recipe.to_dict()))  # tuples become lists
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    text = yaml.safe_dump(plain, sort_keys=False, width=120, default_flow_style=False)
    with atomic_write(path) as file:
        file.write(f"{head}{text}".encode())
