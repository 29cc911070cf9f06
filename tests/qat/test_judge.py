"""What a model is said to lose, on detections whose scores are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bevfusion.config import load_config
from bevfusion.create_data import create_data
from bevfusion.nuscenes_tables import open_nuscenes
from lean.quantizer import Quantizer
from lean.recipe import QuantizerSpec
from qat.inference import evaluation_dataset
from qat.judge import Judge
from tests.bevfusion import tiny_nuscenes as tiny
from tests.bevfusion.detections import perfect
from tests.conftest import ROOT
from tests.qat.test_evaluation_scripts import CONFIG, OPTIONS


class Oracle(nn.Module):
    """Finds what there is; with its quantizer on, everything `off` metres away."""

    def __init__(self, frames, off: float):
        super().__init__()
        self.frames, self.off, self.calls = frames, off, 0
        self.weight, self.quantizer = nn.Parameter(torch.zeros(1)), Quantizer(QuantizerSpec())

    def forward(self, **_) -> list[dict]:
        result = perfect(self.frames[self.calls % len(self.frames)])
        self.calls += 1
        if not self.quantizer._disabled:
            result["boxes_3d"].tensor[:, 0] += self.off
        return [result]


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Judge:
    root: Path = tiny.TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(root, "v1.0-mini", database=False)
    cfg = load_config(ROOT / CONFIG, [*OPTIONS, f'dataset_root="{root}/"'])
    dataset = evaluation_dataset(cfg)
    return Judge(dataset, range(len(dataset)), 0, open_nuscenes(root, "v1.0-mini"))


@pytest.mark.parametrize(("off", "lost"), [(0.0, 0.0), (0.75, 0.25), (3.0, 0.75), (30.0, 1.0)])
def test_losses_are_those_of_the_official_scores(judged, off, lost):
    """A box 0.75 m away is missed at one of the four distances that AP is averaged over, 3 m at three of them."""
    judged._reference = judged._reference_scores = None
    model = Oracle(judged.dataset.data_infos, off)
    before = judged.reference_scores(model)
    assert judged.drop(model, "mAP") == pytest.approx(100 * before.mean_ap * lost, abs=1e-6)
    assert before.mean_ap > 0
    assert judged.drop(model, "NDS") >= 100 * before.mean_ap * lost / 2 - 1e-6
    expected = 100 * (1 - (1 - off / 2) / (1 + off / 2)) if off < 2 else 100.0
    assert judged.drop(model, "drift") == pytest.approx(expected, abs=0.1)
    assert not model.quantizer._disabled
    assert np.isclose(judged.scores(judged.reference(model)).mean_ap, before.mean_ap)


def test_frames_and_the_reference_are_made_once(judged):
    judged._reference = judged._reference_scores = None
    model = Oracle(judged.dataset.data_infos, 1.0)
    judged.drop(model, "drift")
    judged.drop(model, "drift")
    assert model.calls == 3 * len(judged.indices)
    assert judged.batches() is judged.batches()
