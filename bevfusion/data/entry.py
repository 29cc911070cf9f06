"""Reading untrusted nested mappings with errors that name the place and the key."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bevfusion.errors import InputError


class Entry:
    """A mapping out of an info file that knows where it stands.

    Args:
        values: the mapping.
        where: file, frame and path of keys, for error messages.

    Raises:
        InputError: `values` is no mapping; every method raises it, naming `where` and the key.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise InputError(f"{where} should be a mapping, not {type(values).__name__}")
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise InputError(f"{self.where}: key {key!r} is missing")
        return self.values[key]

    def text(self, key: str) -> str:
        """A string."""
        value = self[key]
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {key!r} should be a string, not {type(value).__name__}")
        return str(value)

    def array(self, key: str, *shape: int, finite: bool = True) -> np.ndarray:
        """Numbers as float64 of `shape`, where -1 stands for any length; [] fits every shape without elements."""
        value = self[key]
        try:
            value = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise InputError(f"{self.where}: {key!r} should be numbers of shape {shape}") from None
        if value.size == 0 and min(shape, default=1) <= 0:
            value = value.reshape([max(length, 0) for length in shape])
        fits = value.ndim == len(shape) and all(
            want in (-1, have) for want, have in zip(shape, value.shape, strict=True)
        )
        if not fits:
            raise InputError(f"{self.where}: {key!r} should have shape {shape}, not {value.shape}")
        if finite and not np.isfinite(value).all():
            raise InputError(f"{self.where}: {key!r} holds NaN or infinity")
        return value

    def entry(self, key: str) -> "Entry":
        """A mapping inside this one."""
        return Entry(self[key], f"{self.where}: {key!r}")

    def entries(self, key: str) -> list["Entry"]:
        """A list of mappings inside this one."""
        values = self[key]
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise InputError(f"{self.where}: {key!r} should be a list, not {type(values).__name__}")
        return [Entry(value, f"{self.where}: {key}[{i}]") for i, value in enumerate(values)]


def column(entries: Sequence[Entry], key: str, *shape: int) -> np.ndarray:
    """One key of N mappings, numbers of `shape` each, as a (N, ...) float64 array.

    Raises:
        InputError: names the mapping and what is wrong with its key.
    """
    try:
        values = np.array([entry.values[key] for entry in entries], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        values = np.empty(0)
    if values.shape == (len(entries), *shape) and np.isfinite(values).all():
        return values
    return np.array([entry.array(key, *shape) for entry in entries]).reshape(len(entries), *shape)  # finds the fault
