"""Data sets around data sets: building them from nested configs, class-balanced sampling."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmdet.datasets import ConcatDataset
from mmdet3d.datasets import dataset_wrappers
from torch.utils.data import Dataset

from bevfusion.errors import explaining
from bevfusion.registry import DATASETS

logger = logging.getLogger(__name__)


@DATASETS.register_module()
class CBGSDataset(dataset_wrappers.CBGSDataset):
    """mmdet3d's class-balanced sampling (https://arxiv.org/abs/1908.09492), also where a class has no frame at all.

    Args:
        dataset: built data set with `CLASSES` and `get_cat_ids`.
    """

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set inside."""
        self.dataset.set_epoch(epoch)

    def _get_sample_indices(self) -> list[int]:
        frames = {label: [] for label in self.cat2id.values()}
        for index in range(len(self.dataset)):
            for label in self.dataset.get_cat_ids(index):
                frames[label].append(index)
        absent = [name for name, label in self.cat2id.items() if not frames[label]]
        if absent:
            logger.warning("class-balanced sampling: no frame holds %s", ", ".join(absent))
        if len(absent) == len(frames):
            return list(range(len(self.dataset)))
        present = [indices for indices in frames.values() if indices]
        total = sum(map(len, present))
        chosen = []
        for indices in present:
            ratio = 1.0 / len(present) / (len(indices) / total)
            chosen += np.random.choice(indices, max(int(len(indices) * ratio), 1)).tolist()
        return chosen


def build_dataset(cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Dataset:
    """Data set of a config; wrappers (CBGSDataset, RepeatDataset) hold another under `dataset`; a list is joined.

    Raises:
        InputError: a type is unknown, or the data set's files can't be used.
    """
    with explaining("the data set of the config can't be built", "check its values"):
        return _build(cfg)


def _build(cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Dataset:
    if not isinstance(cfg, Mapping):
        return ConcatDataset([build_dataset(item) for item in cfg])
    if isinstance(cfg.get("dataset"), Mapping):
        cfg = {**cfg, "dataset": build_dataset(cfg["dataset"])}
    return DATASETS.build(cfg)
