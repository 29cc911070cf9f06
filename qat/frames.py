"""The frames that calibration runs over."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from bevfusion.data import build_dataset, calibration_dataset, calibration_frames, frames_of
from bevfusion.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frames:
    """The frames that calibration runs over.

    Attributes:
        asked: how many were asked for.
        indices: into `frames_of(dataset)`, in the order of the run.
        tokens: sample tokens, in the same order.
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

    def describe(self) -> str:
        """Numbers of training and validation samples, and of the frames chosen."""
        validation = "unknown" if self.validation is None else str(self.validation)
        lines = [f"training frames: {self.available} (samples: {self.samples}), validation frames: {validation}"]
        if len(self.indices) < self.asked:
            lines.append(f"calibrating on all {len(self.indices)} frames there are; {self.asked} were asked for")
        return "\n".join(lines)


def choose_frames(cfg: Mapping[str, Any], pipeline: str, count: int, seed: int) -> Frames:
    """Open the training data and choose `count` frames, spread over all scenes, by the seed alone.

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
    )


def _count_validation(cfg: Mapping[str, Any]) -> int | None:
    """How many validation frames there are: a piece of news that no calibration depends on, so that it may be None."""
    config = cfg["data"]["val"]
    if not Path(config["ann_file"]).exists():
        return None
    try:
        return len(frames_of(build_dataset(config)))
    except InputError as error:
        logger.warning("validation frames can't be counted: %s", error)
        return None
