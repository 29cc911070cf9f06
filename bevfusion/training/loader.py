"""Batches for training: shuffled, shared out over the processes, and the same again when a run is resumed."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from bevfusion.data import FrameLoader, build_dataset, to_device
from bevfusion.data.loader import GROUND_TRUTH_ONLY
from bevfusion.errors import InputError


def training_dataset(cfg: Mapping[str, Any]) -> Dataset:
    """Training frames of a resolved config, without transforms that make ground truth of heads that are not built.

    Raises:
        InputError: the data can't be used.
    """
    dataset = build_dataset(_without_map_masks(cfg["data"]["train"]))
    if len(dataset) == 0:
        raise InputError("the config's data.train holds no frame")
    return dataset


def _without_map_masks(cfg: Mapping[str, Any]) -> dict[str, Any]:
    if "dataset" in cfg:
        return {**cfg, "dataset": _without_map_masks(cfg["dataset"])}
    return {**cfg, "pipeline": [step for step in cfg["pipeline"] if step["type"] not in GROUND_TRUTH_ONLY]}


class TrainingLoader:
    """Batches of one process as arguments of the model's forward, on its device.

    The order of the frames, and every random choice of an epoch, depend on the seed, the epoch and the rank alone: a
    run that is resumed goes on as if it had not been interrupted.

    Args:
        batch_size: frames a batch and process; the last one of an epoch may be smaller.
        workers: processes that load; 0 loads in this one.
        rank, world_size: which of how many processes this is.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        workers: int,
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.device, self.seed, self.rank = dataset, device, seed, rank
        self.sampler = DistributedSampler(dataset, world_size, rank, seed=seed)
        self.batches = FrameLoader(dataset, batch_size, workers, self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Prepare for an epoch: order, random state, and transforms that change their mind during training."""
        self.sampler.set_epoch(epoch)
        _set_epoch(self.dataset, epoch)
        seed_everything(self.seed, epoch, self.rank)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (to_device(batch, self.device) for batch in self.batches)


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators from non-negative integers."""
    numbers = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(numbers[0]))
    np.random.seed(numbers[1])
    torch.manual_seed(int(numbers[2]))


def _set_epoch(dataset: Dataset, epoch: int) -> None:
    """Tell the data set, or those inside a wrapper that doesn't pass it on."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
        return
    for inner in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if inner is not None:
            _set_epoch(inner, epoch)
