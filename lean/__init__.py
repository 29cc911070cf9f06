"""Post-training INT8 quantisation of BEVFusion: `lean.load`, `lean.quantize`, `lean.funcs` and `lean.train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    build: Callable[[Mapping[str, Any]], torch.nn.Module] | None = None,
) -> torch.nn.Module:
    """Load the quantised model of a `.safetensors` file of `qat/ptq.py`, in evaluation mode.

    Nothing is unpickled: the float model is built from the config in the file, then quantised and filled.

    Args:
        build: makes the float model from the config's `model`; by default BEVFusion.

    Raises:
        QuantizationError: the file is missing, damaged, or does not fit the model.
    """
    from lean.artifact import load as load_artifact  # here, so that importing lean costs nothing

    return load_artifact(Path(path), device, build)
