"""Groups of layers that have one input quantizer, because they read one tensor or must have one scale."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from lean.layers import QuantLayer
from lean.matching import matches, no_match
from lean.recipe import ShareRule


def apply_sharing(root: nn.Module, rules: Iterable[ShareRule]) -> None:
    """Give the followers of each rule their leader's input quantizer; names are relative to `root`.

    A follower that shares already brings its whole group along.

    Raises:
        QuantizationError: a rule that is not optional names a layer that is not quantised.
    """
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    layers = {name: root.get_submodule(name) for name in names}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, QuantLayer)}
    for rule in rules:
        for leader, followers in _instances(rule, names, layers):
            kept = layers[leader]._input_quantizer
            dropped = {layers[name]._input_quantizer for name in followers} - {kept}
            for layer in layers.values():
                if layer._input_quantizer in dropped:
                    layer._input_quantizer = kept


def _instances(rule: ShareRule, names: list[str], layers: dict[str, QuantLayer]) -> Iterator[tuple[str, list[str]]]:
    """Yield the leader and followers for every way to fill in the rule's words."""
    template = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(rule.leader))
    found = [(name, match.groupdict()) for name in layers if (match := re.fullmatch(template, name))]
    if not found and not rule.optional:
        raise no_match(rule.leader, layers, "share rule")
    for leader, words in found:
        if any(matches(name, [pattern.format(**words) for pattern in rule.unless]) for name in names):
            continue
        followers = [follower.format(**words) for follower in rule.followers]
        missing = [name for name in followers if name not in layers]
        if missing and not rule.optional:
            raise no_match(missing[0], layers, "share rule's follower")
        yield leader, [name for name in followers if name in layers]


def sharing_groups(model: nn.Module) -> list[list[str]]:
    """Return the names of the layers of each group that shares an input quantizer (two layers or more)."""
    groups: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            groups.setdefault(layer._input_quantizer, []).append(name)
    return [names for names in groups.values() if len(names) > 1]
