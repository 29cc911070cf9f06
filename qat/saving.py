"""How `qat/ptq.py` writes its result: one run at a time, whole and checked or not at all, in two forms."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmcv.parallel import MMDataParallel
from torch import nn

from lean.artifact import Artifact
from lean.calibrate import model_device, reset_statistics
from lean.distributed import rank
from lean.export.folder import all_or_none
from lean.files import digest, explained
from lean.lock import sole_writer
from qat.collection import partial_file

SAFE = ".safetensors"

logger = logging.getLogger(__name__)


def outputs(save: Path) -> list[Path]:
    """The files of a result: the pickle and the `.safetensors` file beside it, or that alone if `save` is called so."""
    if save.suffix == SAFE:
        return [save]
    return [save, save.with_name(save.name.removesuffix(".pth").removesuffix(".pt") + SAFE)]


def claim(save: Path) -> AbstractContextManager[None]:
    """Keep other runs from writing this result for the length of a `with` block; the first process does it for all.

    Raises:
        QuantizationError: another run is writing it.
    """
    return sole_writer(outputs(save)[-1]) if rank() == 0 else nullcontext()


@contextmanager
def staged(save: Path) -> Iterator[Path]:
    """Give a `with` block an empty folder, whose files become the result when the block ends well.

    Raises:
        QuantizationError: they can't be written; an older result is as it was.
    """
    with all_or_none(save.parent, f".{save.name}.new") as staging:
        yield staging
    partial_file(save).unlink(missing_ok=True)


def write(model: nn.Module, save: Path, staging: Path, made_of: Mapping[str, Any]) -> list[Path]:
    """Write the quantised model in its forms into `staging`, and return the files.

    `torch.load(file, weights_only=False).module` gives the model back from the pickle, where it is wrapped in
    `MMDataParallel` as exporters expect it; `lean.load(file)` from the other. Its attribute `ptq` is `made_of`.

    Raises:
        QuantizationError: the disk is full.
    """
    model.ptq = dict(made_of)
    reset_statistics(model)
    files = [staging / path.name for path in outputs(save)]
    for file in files:
        with explained(save.with_name(file.name)), file.open("wb") as stream:
            if file.suffix == SAFE:
                stream.write(Artifact.of(model, made_of).to_bytes())
            else:
                torch.save(in_parallel(model), stream)
    return files


def in_parallel(model: nn.Module) -> MMDataParallel:
    """Wrap a model in `MMDataParallel` on the device it is on, which may be the CPU of a machine with a GPU."""
    device = model_device(model)
    if device.type == "cuda" or not torch.cuda.is_available():
        return MMDataParallel(model, device_ids=[device.index or 0] if device.type == "cuda" else [])
    wrapped = MMDataParallel(model, device_ids=[0])  # an empty list fails there, and [0] moves the model
    wrapped.device_ids = []
    model.to(device)
    return wrapped


def warn_if_replaced(checkpoint: str | Path, sha256: str) -> None:
    """Say that a checkpoint is no longer the one that was loaded."""
    try:
        same = digest(checkpoint) == sha256
    except OSError:
        same = False
    if not same:
        logger.warning(
            "%s has changed since it was loaded: the result is made of the earlier one, sha256 %s", checkpoint, sha256
        )
