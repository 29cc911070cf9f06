"""A pipeline: transforms one after the other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bevfusion.registry import PIPELINES


class Compose:
    """Transforms built from their configs, ours first, mmdet3d's and mmdet's otherwise.

    Args:
        transforms: configs with a `type`, or callables that take and return the dict of a frame.

    Raises:
        InputError: a type is unknown.
    """

    def __init__(self, transforms: Sequence[Mapping | Callable]):
        self.transforms = [item if callable(item) else PIPELINES.build(item) for item in transforms]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        for transform in self.transforms:
            data = transform(data)
        return data
