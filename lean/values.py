"""What modules get and give: told apart by memory, copied without their tensors, searched for tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from spconv.pytorch import SparseConvTensor
from torch import Tensor

SCALARS = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


def identity(value: Any) -> tuple | None:
    """A key that two arguments share only if they are the same values in the same memory; None if that can't be told.

    Whoever keeps a key must keep the tensors as well: freed memory is used again.
    """
    parts: list = []
    return tuple(parts) if _identify(value, parts) else None


def copied(value: Any) -> Any:
    """The same tensors in new lists, tuples, mappings and sparse tensors, for callers that write into those."""
    if isinstance(value, SparseConvTensor):
        return value.shadow_copy()
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copied, value))
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a module's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, SparseConvTensor):
        return [value.features, value.indices]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def _identify(value: Any, parts: list) -> bool:
    if isinstance(value, Tensor):
        parts.append((value.data_ptr(), value.shape, value.stride(), value.dtype, value.device, value._version))
        return True
    if isinstance(value, SparseConvTensor):
        parts.append((tuple(value.spatial_shape), value.batch_size))
        return _identify(value.features, parts) and _identify(value.indices, parts)
    if isinstance(value, SCALARS):
        parts.append((type(value), value))
        return True
    if isinstance(value, Mapping):
        parts.append((type(value), *value))
        return all(_identify(item, parts) for item in value.values())
    if isinstance(value, list | tuple):
        parts.append((type(value), len(value)))
        return all(_identify(item, parts) for item in value)
    return False
