"""The processes of one run: `torchrun` starts them, each takes a share of the frames, the first writes files."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lean.errors import QuantizationError

PATIENCE = timedelta(minutes=30)  # for a process whose share of the frames takes longer


def rank() -> int:
    """Number of this process, 0 for the one that writes files; also before `process_group`."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes of the run; also before `process_group`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU where `device` is CUDA without a number and several processes run, else `device`."""
    if device.type != "cuda" or world() == 1 or device.index is not None:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise QuantizationError(
            f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
            "start as many processes as there are GPUs"
        )
    return torch.device("cuda", local)


def gathered(mine: Iterable[Any]) -> list[Any]:
    """What all processes of the run have, those of the first one first; every process has to ask for it."""
    mine = list(mine)
    if not (dist.is_available() and dist.is_initialized()):
        return mine
    everyone: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [item for items in everyone for item in items]


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes that `torchrun` started, for the length of a `with` block; nothing in a run of one.

    NCCL connects GPUs, gloo CPUs. When another process dies, what waits for it stops with QuantizationError.
    """
    if world() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        yield
    except (dist.DistError, RuntimeError) as error:
        if not _lost_another(error):
            raise
        raise QuantizationError(f"process {rank()} stops: another process of this run has ended") from error
    dist.destroy_process_group()


def _lost_another(error: Exception) -> bool:
    """Whether an error of torch is that of a collective operation whose other side is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "gloo")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
