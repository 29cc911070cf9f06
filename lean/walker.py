"""The one walker: every replacement of modules goes through here."""

from collections.abc import Callable

from torch import nn


def replace_modules(model: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]) -> dict[str, nn.Module]:
    """Swap every submodule for which `convert(name, module)` returns a new one.

    Collects first and swaps afterwards, so `convert` always sees the model as it was. A module that hangs at
    several names is converted once and stays one module. Children are swapped before their parents, so that a parent's
    new module may hold the old one.

    Returns:
        The new modules by name.
    """
    made: dict[nn.Module, nn.Module | None] = {}
    swaps: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        if module not in made:
            made[module] = convert(name, module)
        if made[module] is not None:
            swaps[name] = made[module]
    for name, new in reversed(swaps.items()):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return swaps
