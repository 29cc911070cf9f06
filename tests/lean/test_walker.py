"""Replacement of modules."""

import torch
from torch import nn

from lean.walker import replace_modules


class Wrapped(nn.Conv2d):
    """A subclass, as mmcv's wrappers are."""


def to_identity(_: str, module: nn.Module) -> nn.Module | None:
    return nn.Identity() if isinstance(module, nn.Conv2d) else None


def test_replaces_at_every_depth_and_subclasses_too():
    inner = nn.Sequential(Wrapped(1, 1, 1), nn.ReLU())
    model = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1), "b": nn.ModuleList([inner])})
    assert list(replace_modules(model, to_identity)) == ["a", "b.0.0"]
    assert not any(isinstance(module, nn.Conv2d) for module in model.modules())
    assert isinstance(model["b"][0][1], nn.ReLU)


def test_one_module_at_two_places_stays_one_module():
    conv = nn.Conv2d(1, 1, 1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv)})
    swaps = replace_modules(model, to_identity)
    assert list(swaps) == ["a", "b.0"]
    assert model["a"] is model["b"][0]


def test_convert_sees_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    seen = []

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        seen.append([type(child) for child in model])
        return to_identity(name, module)

    replace_modules(model, convert)
    assert seen == [[nn.Conv2d, nn.Conv2d]] * 2
    assert torch.equal(model(torch.ones(1)), torch.ones(1))


def test_the_root_is_left_alone():
    assert replace_modules(nn.Conv2d(1, 1, 1), to_identity) == {}
