"""Puts quantised layers where a recipe wants them, and makes them share quantizers."""

import logging
from collections.abc import Container
from dataclasses import dataclass, field

from torch import nn

from lean.errors import QuantizationError
from lean.layers import LayerSpec, QuantLayer, quantised_form, why_float
from lean.matching import matches, no_match, select
from lean.recipe import BranchRecipe, LayerRule, QuantizerSpec, Recipe
from lean.sharing import apply_sharing
from lean.walker import replace_modules

logger = logging.getLogger(__name__)


@dataclass
class Inserted:
    """What became of the layers of a model or branch.

    Attributes:
        quantised: names of the layers that are quantised now, in module order.
        left_float: layers with weights that a rule covers but that stayed float, with the reason.
    """

    quantised: list[str] = field(default_factory=list)
    left_float: dict[str, str] = field(default_factory=dict)


def insert_quantizers(model: nn.Module, recipe: Recipe) -> Inserted:
    """Quantise the branches of `model` as `recipe` says, in place.

    Raises:
        QuantizationError: a branch, rule or shared layer of the recipe is not in the model.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    done = Inserted()
    for branch in recipe.branches:
        if branch.path not in names:
            raise no_match(branch.path, names, "branch")
        part = insert_branch(
            model.get_submodule(branch.path), branch, recipe.activation, recipe.weight, recipe.transposed_axis
        )
        done.quantised += [f"{branch.path}.{name}" for name in part.quantised]
        done.left_float |= {f"{branch.path}.{name}": why for name, why in part.left_float.items()}
    return done


def insert_branch(
    root: nn.Module,
    branch: BranchRecipe,
    activation: QuantizerSpec | None = None,
    weight: QuantizerSpec | None = None,
    transposed_axis: int = 0,
) -> Inserted:
    """Quantise the layers below `root`, the module at the branch's path, in place; names are relative to it.

    Raises:
        QuantizationError: a rule that is not optional fits no layer that can be quantised.
    """
    activation, weight = activation or QuantizerSpec(), weight or QuantizerSpec(calibrator="max")
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    kept = set(select(branch.keep_float, names, f"keep_float of branch {branch.path!r}:"))
    left_float: dict[str, str] = {}

    def swap(name: str, module: nn.Module) -> QuantLayer | None:
        rule = next((rule for rule in reversed(branch.quantize) if matches(name, [rule.pattern])), None)
        form, why = quantised_form(module), why_float(module)
        if rule is None or (form is None and why is None):
            return None
        if why or name in kept:
            left_float[name] = why or "the recipe keeps it float"
            return None
        return form.from_float(module, LayerSpec(activation, weight, rule.inputs, transposed_axis))

    swaps = replace_modules(root, swap)
    for rule in branch.quantize:
        _check(rule, branch.path, names, swaps, left_float)
    apply_sharing(root, branch.share)
    for name, why in left_float.items():
        level = logging.INFO if name in kept else logging.WARNING
        logger.log(level, "%s.%s stays float: %s", branch.path, name, why)
    return Inserted(list(swaps), left_float)


def _check(rule: LayerRule, path: str, names: list[str], swaps: Container[str], left_float: dict[str, str]) -> None:
    """Refuse a rule that quantised nothing, unless it is optional."""
    fitting = select([rule.pattern], names, f"rule of branch {path!r}:") if not rule.optional else []
    if fitting and not any(name in swaps for name in fitting):
        why = next((f": {name}: {left_float[name]}" for name in fitting if name in left_float), "")
        raise QuantizationError(f"rule {rule.pattern!r} of branch {path!r} fits no layer that can be quantised{why}")
