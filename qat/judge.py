"""What a quantised model loses against its float original on chosen frames: in mAP, NDS or drift."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nuscenes import NuScenes
from torch import nn
from tqdm import tqdm

from bevfusion.data import FrameLoader, NuScenesDataset, to_device
from bevfusion.errors import InputError
from bevfusion.evaluation import DetectionScores, score_submission, to_submission
from bevfusion.evaluation.drift import Boxes, Drift, measure_drift
from lean.calibrate import model_device
from lean.switches import disable_quantization
from qat.inference import evaluation_dataset, spread
from qat.preparing import open_tables


class Judge:
    """Runs models over frames that are loaded once and then kept, and scores what they find.

    Args:
        dataset: validation frames.
        indices: which of them.
        workers: data loading processes.
        nuscenes: opened tables, for the official metrics.
    """

    def __init__(
        self, dataset: NuScenesDataset, indices: Sequence[int], workers: int = 0, nuscenes: NuScenes | None = None
    ):
        self.dataset, self.indices, self.nuscenes = dataset, list(indices), nuscenes
        self._loader = FrameLoader(dataset, 1, workers, sampler=self.indices)
        self._batches: list[Mapping[str, Any]] = []
        self._reference: list[dict] | None = None
        self._reference_scores: DetectionScores | None = None

    @property
    def tokens(self) -> list[str]:
        """Sample tokens of the frames."""
        return [self.dataset.data_infos[index].token for index in self.indices]

    def batches(self) -> list[Mapping[str, Any]]:
        """The frames, as the data loader gives them; raises InputError if one can't be read."""
        if not self._batches:
            self._batches = list(self._loader)
        return self._batches

    def detect(self, model: nn.Module, title: str = "detect") -> list[dict]:
        """One result a frame."""
        device, results = model_device(model), []
        with torch.no_grad():
            for batch in tqdm(self.batches(), title, unit="frame", disable=None, leave=False):
                results += model(**to_device(batch, device))
        return results

    def reference(self, model: nn.Module) -> list[dict]:
        """Results of `model` without quantisation, kept from the first call on."""
        if self._reference is None:
            with disable_quantization(model):
                self._reference = self.detect(model, "float model")
        return self._reference

    def reference_scores(self, model: nn.Module) -> DetectionScores:
        """Official metrics of `reference`, kept like it."""
        if self._reference_scores is None:
            self._reference_scores = self.scores(self.reference(model))
        return self._reference_scores

    def scores(self, results: Sequence[Mapping], tokens: Sequence[str] | None = None) -> DetectionScores:
        """Official metrics of results, over all frames or over `tokens`."""
        frames = [self.dataset.data_infos[index] for index in self.indices]
        submission = to_submission(results, frames, self.dataset.CLASSES, self.dataset.modality)
        return score_submission(submission, self.nuscenes, tokens or self.tokens)

    def drift(self, reference: Sequence[Mapping], results: Sequence[Mapping]) -> Drift:
        """Drift of results from those of another model."""
        classes = len(self.dataset.CLASSES)
        pairs = zip(map(Boxes.of, reference), map(Boxes.of, results), strict=True)
        return sum((measure_drift(a, b, classes) for a, b in pairs), Drift.none(classes))

    def drop(self, model: nn.Module, metric: str, title: str = "detect") -> float:
        """Points that `model`, as it stands, loses against itself without quantisation.

        mAP and NDS: difference in per cent. drift: per cent of the two models' detections that they disagree on.
        """
        reference, results = self.reference(model), self.detect(model, title)
        if metric == "drift":
            return 100 * (self.drift(reference, results).measures()["disagreement"] or 0.0)
        before, after = self.reference_scores(model), self.scores(results)
        return 100 * (before.mean_ap - after.mean_ap if metric == "mAP" else before.nds - after.nds)


def open_judges(cfg: Mapping[str, Any], metric: str, count: int, seed: int, workers: int) -> tuple[Judge, Judge]:
    """Judges over two disjoint sets of up to `count` validation frames each: to search on, and to verify on.

    Raises:
        InputError: there are no frames for both, or `metric` needs annotations that are not there.
    """
    dataset = evaluation_dataset(cfg)
    halves = split_frames([frame.scene for frame in dataset.data_infos], count, seed)
    if not all(halves):
        raise InputError(f"--auto needs two validation frames or more; {dataset.ann_file} has {len(dataset)}")
    nuscenes = None if metric == "drift" else open_tables(dataset, [index for half in halves for index in half])
    search, verify = (Judge(dataset, half, workers, nuscenes) for half in halves)
    return search, verify


def split_frames(scenes: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Two disjoint lists of up to `count` indices each, by each frame's scene; a scene is in one of them alone.

    A pure function of its arguments. If all frames are of one scene, its first half is searched on.
    """
    names = sorted(set(scenes))
    if len(names) < 2:
        middle = len(scenes) // 2
        halves = [list(range(middle)), list(range(middle, len(scenes)))]
    else:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        first = {names[i] for i in order[: len(names) // 2]}
        halves = [[i for i, scene in enumerate(scenes) if (scene in first) is side] for side in (True, False)]
    search, verify = ([half[i] for i in spread(len(half), count)] for half in halves)
    return search, verify
