"""A quantised model in one safetensors file: loading it builds the model anew, and runs no code of the file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lean.bevfusion_recipe import FLOAT_MODEL
from lean.checked_file import pack, plain, unpack
from lean.errors import QuantizationError
from lean.structure import Structure, describe, impose, stored_tensors

FORMAT = 1

Builder = Callable[[Mapping[str, Any]], nn.Module]


@dataclass(frozen=True)
class Artifact:
    """A quantised model as data.

    Attributes:
        made_of: config, checkpoint, recipe, frames and versions that it comes from; `config.model` builds the float
            model.
        structure: what was quantised, shared, disabled, folded and fused.
        tensors: weights, buffers and amax by name, on the CPU.
    """

    made_of: Mapping[str, Any]
    structure: Structure
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, made_of: Mapping[str, Any]) -> Self:
        """Describe `model`, whose tensors are not copied."""
        return cls(plain(made_of), describe(model), stored_tensors(model))

    def to_bytes(self) -> bytes:
        """Return a file's content, equal for equal artifacts.

        Raises:
            QuantizationError: `made_of` holds more than mappings, lists and scalars, or safetensors is missing.
        """
        structure = self.structure.to_dict()
        return pack(self.tensors, {"format": FORMAT, "made_of": self.made_of, "structure": structure})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            QuantizationError: it is missing, damaged, or comes from another version of this project.
        """
        tensors, document = unpack(path)
        if document.get("format") != FORMAT:
            raise QuantizationError(
                f"{path} is written in format {document.get('format')}, this version reads {FORMAT}: quantise anew"
            )
        structure = Structure.from_dict(document.get("structure"), f"{path}: structure")
        return cls(document.get("made_of"), structure, tensors)

    def build(self, build: Builder | None = None) -> nn.Module:
        """Build the model in evaluation mode on the CPU, with `made_of` as its attribute `ptq`.

        Args:
            build: makes the float model from `made_of["config"]["model"]`; by default BEVFusion.

        Raises:
            QuantizationError: the saved layers or tensors don't fit the float model.
        """
        try:
            config = self.made_of["config"]["model"]
        except (KeyError, TypeError):
            raise QuantizationError("the config of the float model was not saved: quantise anew") from None
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, in vain
            model = (build or _default_builder())(config)
        impose(model, self.structure, self.tensors)
        model.ptq = dict(self.made_of)
        return model.eval()


def load(path: Path, device: torch.device | str = "cpu", build: Builder | None = None) -> nn.Module:
    """Build the quantised model of a file; see `lean.load`."""
    try:
        return Artifact.read(path).build(build).to(device)
    except QuantizationError as error:
        raise error if str(path) in str(error) else QuantizationError(f"{path}: {error}") from None


def _default_builder() -> Builder:
    module, _, name = FLOAT_MODEL.partition(":")
    return getattr(importlib.import_module(module), name)
