"""What quantizers have seen, as a value that is saved, compared and gone on from."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lean.errors import QuantizationError
from lean.files import atomic_write
from lean.histogram import Histogram


@dataclass(frozen=True)
class Statistics:
    """The histograms of a model's input quantizers after a number of frames.

    Attributes:
        histograms: by quantizer name.
        frames: how many frames, from the first on, they come from.
        made_of: what they depend on (config, checkpoint, frames, ...): mappings, lists and scalars, as JSON holds them.
    """

    histograms: Mapping[str, Histogram]
    frames: int
    made_of: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all.

        Raises:
            QuantizationError: it can't be written; an older file is as it was.
        """
        head = {"names": list(self.histograms), "frames": self.frames, "made_of": self.made_of}
        arrays = [histogram.to_dict() for histogram in self.histograms.values()]
        stacked = {key: np.stack([one[key] for one in arrays]) for key in arrays[0]} if arrays else {}
        with atomic_write(path) as file:
            np.savez_compressed(file, head=np.array(json.dumps(head)), **stacked)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            QuantizationError: the file is missing or damaged, or comes from another version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            head = json.loads(str(arrays.pop("head")))
            rows = [{key: array[i] for key, array in arrays.items()} for i in range(len(head["names"]))]
            histograms = dict(zip(head["names"], map(Histogram.from_dict, rows), strict=True))
            return cls(histograms, head["frames"], head["made_of"])
        except FileNotFoundError:
            raise QuantizationError(f"statistics file not found: {path}") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
            if isinstance(error, QuantizationError):
                raise
            raise QuantizationError(f"{path} is not a statistics file, or is damaged ({error})") from error

    def refuse_other(self, made_of: Mapping[str, Any], where: str) -> None:
        """Make sure that what the statistics are used for is made of the same; only keys of `made_of` are compared.

        Raises:
            QuantizationError: naming the first difference and how many there are; `where` names the file.
        """
        wanted = json.loads(json.dumps(made_of))
        found = list(differences({key: self.made_of.get(key) for key in wanted}, wanted))
        if found:
            (name, there, here), more = found[0], f" (and {len(found) - 1} more differences)" if found[1:] else ""
            raise QuantizationError(f"{where} comes from another run: {name} was {there}, now it is {here}{more}")


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted name, value in `a` and value in `b` of every leaf that differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{name}.{index}")
    elif a != b:
        yield name, _short(a), _short(b)


def _short(value: Any) -> str:
    """A value on part of a line."""
    if isinstance(value, list | dict):
        return f"{len(value)} items"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
