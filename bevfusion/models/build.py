"""Build a model from its config."""

from collections.abc import Mapping

from mmcv.runner import BaseModule
from torch import nn

from bevfusion.errors import explaining
from bevfusion.registry import MODELS


def _without_downloads(config: object) -> object:
    """Copy a config tree without `init_cfg`s of pretrained weights: the checkpoint, if any, brings every weight."""
    if isinstance(config, Mapping):
        return {key: _without_downloads(value) for key, value in config.items() if key != "init_cfg"}
    if isinstance(config, (list, tuple)):
        return [_without_downloads(value) for value in config]
    return config


def build_model(config: Mapping, pretrained: bool = False) -> nn.Module:
    """Build the model of `cfg.model`, in evaluation mode.

    Args:
        config: the model's part of a config; it is left as it is.
        pretrained: initialise backbones as their `init_cfg` says, which may download weights (for training).

    Raises:
        InputError: its values don't make a model.
    """
    with explaining("the model of the config can't be built", "check its values"):
        model = MODELS.build(config if pretrained else _without_downloads(config))
    if pretrained:
        _initialise(model)
    return model.eval()


def _initialise(module: nn.Module) -> None:
    """Initialise the parts that know how; mmcv's own recursion ends at the first ModuleDict."""
    for child in module.children():
        if isinstance(child, BaseModule):
            child.init_weights()
        else:
            _initialise(child)
