"""Running the trials of a sensitivity analysis over frames: what is kept of each, and going on after a stop."""

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bevfusion.data import FrameLoader, LiDARInstance3DBoxes, NuScenesDataset, to_device
from lean.bevfusion_recipe import outputs_of
from lean.calibrate import model_device
from lean.sensitivity import Outcome, Trial, Unit, plan_trials, run_trials
from lean.sqnr import PARTS, Noise, measure_noise
from qat.journal import Journal
from qat.parallel import share_out

LAYERS = "layers"  # key of the noise of each layer on its own
AT_ONCE = 8  # frames, at most: each has all activations of the network in memory

Missing = Mapping[str, Collection[str]]  # trials by token
Keep = Callable[[tuple[str, Any]], None]  # takes a row's key and the row


@dataclass(frozen=True)
class Experiment:
    """Trials of units on frames.

    Attributes:
        model: calibrated.
        indices: into `dataset`, of the frames.
        part: which quantizers count: `both`, `inputs` or `weights`.
    """

    model: nn.Module
    units: Sequence[Unit]
    dataset: NuScenesDataset
    indices: Sequence[int]
    part: str = "both"

    @property
    def tokens(self) -> list[str]:
        """Sample tokens of the frames."""
        return [self.dataset.data_infos[index].token for index in self.indices]

    def run(self, journal: Journal, workers: int) -> None:
        """Run what the journal lacks, with a progress bar, and add it.

        Raises:
            InputError: a frame can't be read.
            QuantizationError: see `lean.sensitivity.run_trials`.
        """
        trials = [LAYERS, *map(str, plan_trials(self.units))]
        missing = {
            token: [trial for trial in trials if row_key(token, trial) not in journal.rows] for token in self.tokens
        }
        count = sum(map(len, missing.values()))
        todo = [index for index, token in zip(self.indices, self.tokens, strict=True) if missing[token]]
        total = len(trials) * len(self.indices)
        with tqdm(total=total, initial=total - count, desc="trials", unit="trial", smoothing=0.05, disable=None) as bar:

            def keep(found: tuple[str, Any]) -> None:
                journal.add(*found)
                bar.update()

            self._run_frames(todo, missing, workers, keep)

    def _run_frames(self, todo: Sequence[int], missing: Missing, workers: int, keep: Keep) -> None:
        """Run the `missing` trials of the frames `todo`; on the CPU several frames at a time."""
        device = model_device(self.model)
        together = min(torch.get_num_threads(), len(todo), AT_ONCE) if device.type == "cpu" else 1

        def run_frame(index: int, keep: Keep) -> None:
            (batch,) = FrameLoader(self.dataset, 1, 0, sampler=[index])
            self._run_frame(index, to_device(batch, device), missing, keep)

        if together > 1:
            share_out(todo, run_frame, keep, together)
            return
        for index, batch in zip(todo, FrameLoader(self.dataset, 1, workers, sampler=todo), strict=True):
            self._run_frame(index, to_device(batch, device), missing, keep)

    def _run_frame(self, index: int, batch: dict, missing: Missing, keep: Keep) -> None:
        model, token = self.model, self.dataset.data_infos[index].token
        if LAYERS in missing[token]:
            layers = [layer for unit in self.units for layer in unit.layers]
            found = measure_noise(model, [batch], lambda m, one: m(**one), parts=PARTS, layers=layers).layers
            keep((row_key(token, LAYERS), {part: noise_row(noise) for part, noise in found.items()}))

        def report(outcome: Outcome) -> None:
            keep((row_key(token, outcome.trial), outcome_row(outcome)))

        run_trials(
            model,
            lambda: model(**batch),
            self.units,
            report,
            trials={trial for trial in plan_trials(self.units) if str(trial) in missing[token]},
            outputs=outputs_of(model),
            part=self.part,
        )


def row_key(token: str, trial: Trial | str) -> str:
    """Key of a frame's trial in the journal."""
    return f"{token} {trial}"


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """What is kept of a trial: the noise of each output, and the detections."""
    (result,) = outcome.result
    return {"noise": noise_row(outcome.noise), "boxes": encode(result)}


def noise_row(noise: Mapping[str, Noise]) -> dict[str, list[float]]:
    """Noise as lists for JSON."""
    return {name: [value.signal, value.noise] for name, value in noise.items()}


def encode(result: Mapping) -> dict[str, Any]:
    """Detections (boxes_3d, scores_3d, labels_3d) as text, without loss: float32 rows of box, score and label."""
    columns = (result["boxes_3d"].tensor, result["scores_3d"][:, None], result["labels_3d"][:, None])
    table = torch.cat([column.detach().cpu().float() for column in columns], dim=1).numpy()
    return {"columns": table.shape[1], "float32": base64.b64encode(table.astype("<f4").tobytes()).decode()}


def decode(boxes: Mapping[str, Any]) -> dict[str, Any]:
    """Detections as the model gave them, from what `encode` made of them."""
    table = np.frombuffer(base64.b64decode(boxes["float32"]), "<f4").reshape(-1, boxes["columns"])
    values = torch.from_numpy(table.astype(np.float32))
    return {
        "boxes_3d": LiDARInstance3DBoxes(values[:, :-2], box_dim=values.shape[1] - 2),
        "scores_3d": values[:, -2],
        "labels_3d": values[:, -1].long(),
    }
