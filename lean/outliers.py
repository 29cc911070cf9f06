"""Ranges that are far from their neighbours', which is a sign of a damaged layer or frame."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from torch import nn

from lean.matching import matches
from lean.status import layer_status

FACTOR = 1e3


@dataclass(frozen=True)
class Outlier:
    """A layer's amax (`what`: of its input or its weight) and the median of its branch's layers."""

    layer: str
    what: str
    amax: float
    median: float

    def __str__(self) -> str:
        return f"{self.layer} ({self.what} amax {self.amax:.3g}, median {self.median:.3g})"


def outliers(model: nn.Module, branches: Iterable[str], factor: float = FACTOR) -> list[Outlier]:
    """Layers whose amax is more than `factor` times, or less than a `factor`-th of, the median of their branch.

    Inputs are compared with inputs; of a weight's channels the largest counts, and is compared with other weights.
    Disabled layers are left out.
    """
    status = [layer for layer in layer_status(model) if not layer.disabled]
    found = []
    for branch in branches:
        layers = [layer for layer in status if matches(layer.name, [branch, f"{branch}.*"])]
        inputs = {layer.name: layer.input_amax for layer in layers if layer.input_amax is not None}
        weights = {layer.name: layer.weight_amax[1] for layer in layers if layer.weight_amax is not None}
        for what, values in (("input", inputs), ("weight", weights)):
            middle = median(values.values()) if values else 0
            found += [
                Outlier(name, what, amax, middle)
                for name, amax in values.items()
                if not middle / factor <= amax <= middle * factor
            ]
    return found
