"""The frames that calibration runs over."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bevfusion.data import build_dataset, calibration_dataset, calibration_frames, calibration_loader, frames_of
from bevfusion.errors import InputError, explaining

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frames:
    """The frames that calibration runs over.

    Attributes:
        asked: how many were asked for.
        indices: into `frames_of(dataset)`, in the order of the run.
        tokens: sample tokens, in the same order.
        spares: indices of all other frames, in the order in which they replace frames that can't be read.
        skip_bad: whether they do; else such a frame stops the run.
        available, samples, validation: distinct training frames, training samples (a wrapper may repeat frames),
            and validation frames, None where the config's validation info file is missing or can't be read.
    """

    dataset: Dataset
    seed: int
    asked: int
    indices: tuple[int, ...]
    tokens: tuple[str, ...]
    available: int
    samples: int
    validation: int | None
    spares: tuple[int, ...] = ()
    skip_bad: bool = False

    def token(self, index: int) -> str:
        """Sample token of the frame at `index` of the data set."""
        return frames_of(self.dataset).data_infos[index].token

    def describe(self) -> str:
        """Numbers of training and validation samples, and of the frames chosen."""
        validation = "unknown" if self.validation is None else str(self.validation)
        lines = [f"training frames: {self.available} (samples: {self.samples}), validation frames: {validation}"]
        if len(self.indices) < self.asked:
            lines.append(f"calibrating on all {len(self.indices)} frames there are; {self.asked} were asked for")
        return "\n".join(lines)


def choose_frames(cfg: Mapping[str, Any], pipeline: str, count: int, seed: int, skip_bad: bool = False) -> Frames:
    """Open the training data and choose `count` frames, spread over all scenes, and spares, by the seed alone.

    Raises:
        InputError: the data can't be used.
    """
    dataset = calibration_dataset(cfg, pipeline)
    infos = frames_of(dataset).data_infos
    indices = tuple(calibration_frames(dataset, count, seed))
    if not indices:
        raise InputError(f"{cfg['data']['train'].get('ann_file', 'the training info file')} holds no frames")
    return Frames(
        dataset=dataset,
        seed=seed,
        asked=count,
        indices=indices,
        tokens=tuple(infos[index].token for index in indices),
        available=len(infos),
        samples=len(dataset),
        validation=_count_validation(cfg),
        spares=_spares(len(infos), indices, seed),
        skip_bad=skip_bad,
    )


def first_readable(frames: Frames) -> tuple[str, dict[str, Any]]:
    """Token and batch of the first frame of the run, or where `skip_bad` the first that can be read.

    Raises:
        InputError: the first can't be read, or none can.
    """
    loader = calibration_loader(frames.dataset, frames.indices, seed=frames.seed, keep_errors=frames.skip_bad)
    first = None
    for token, batch in zip(frames.tokens, loader, strict=False):
        if not isinstance(batch, InputError):
            return token, batch
        first = first or batch
    raise InputError(f"none of the {len(frames.tokens)} frames can be read; the first: {first}")


def _spares(count: int, chosen: Sequence[int], seed: int) -> tuple[int, ...]:
    """The numbers below `count` that are not `chosen`, in an order that the seed gives."""
    others = np.setdiff1d(np.arange(count), chosen)
    return tuple(np.random.default_rng((seed, 1)).permutation(others).tolist())


def _count_validation(cfg: Mapping[str, Any]) -> int | None:
    """How many validation frames there are: a piece of news that no calibration depends on, so that it may be None."""
    try:
        with explaining("data.val of the config can't be used", "check its values"):
            config = cfg["data"]["val"]
            return len(frames_of(build_dataset(config))) if Path(config["ann_file"]).exists() else None
    except InputError as error:
        logger.warning("validation frames can't be counted: %s", error)
        return None
