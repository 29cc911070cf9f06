"""Official metrics on the validation frames between epochs."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from mmcv.runner import Hook, get_dist_info
from torch import nn

from bevfusion.data import FrameLoader, build_dataset, frames_of, to_device
from bevfusion.data.loader import GROUND_TRUTH_ONLY
from bevfusion.errors import InputError
from bevfusion.evaluation import DetectionScores, score_submission, to_submission
from bevfusion.nuscenes_tables import open_nuscenes

BATCH_SIZE = 4  # frames at a time: enough to keep a GPU busy, little enough for any


class Validation:
    """Scores a model on the frames of `cfg.data.val`, shared out over the processes.

    Raises:
        InputError: the frames, or the tables that they were made from, can't be used.
    """

    def __init__(self, cfg: Mapping[str, Any], workers: int):
        val = cfg["data"]["val"]
        steps = [step for step in val["pipeline"] if step["type"] not in GROUND_TRUTH_ONLY]
        self.dataset = frames_of(build_dataset({**val, "pipeline": steps, "test_mode": True}))
        if not self.dataset.version:
            raise InputError(
                f"{self.dataset.ann_file} does not name its nuScenes version; write it with bevfusion.create_data"
            )
        self.rank, self.world_size = get_dist_info()
        self.indices = range(self.rank, len(self.dataset), self.world_size)
        self.loader = FrameLoader(self.dataset, BATCH_SIZE, workers, sampler=self.indices)
        self.nuscenes = open_nuscenes(self.dataset.dataset_root, self.dataset.version) if self.rank == 0 else None

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> DetectionScores | None:
        """Detect and score; the scores are those of all frames, on the first process, None on the others."""
        model.eval()
        device = next(model.parameters()).device
        results = [result for batch in self.loader for result in model(**to_device(batch, device))]
        frames = [self.dataset.data_infos[index] for index in self.indices]
        submission = to_submission(results, frames, self.dataset.CLASSES, self.dataset.modality)
        if self.world_size > 1:
            parts: list[Any] = [None] * self.world_size
            dist.all_gather_object(parts, submission["results"])
            submission["results"] = {token: entries for part in parts for token, entries in part.items()}
        return score_submission(submission, self.nuscenes) if self.nuscenes else None


class ValidationHook(Hook):
    """Validates after every `interval` epochs and after the last; the logger hooks report mAP, NDS and class APs."""

    def __init__(self, validation: Validation, interval: int):
        self.validation, self.interval = validation, interval

    def after_train_epoch(self, runner: Any) -> None:
        """Validate, if it is time."""
        if not self.every_n_epochs(runner, self.interval) and not self.is_last_epoch(runner):
            return
        scores = self.validation(runner.detector)
        if scores is not None:
            errors = {f"val/{name}": value for name, value in scores.tp_errors.items()}
            classes = {f"val/ap/{name}": value for name, value in scores.class_aps.items()}
            runner.log_buffer.output.update({"val/mAP": scores.mean_ap, "val/NDS": scores.nds, **errors, **classes})
            runner.log_buffer.ready = True
