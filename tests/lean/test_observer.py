"""Observers: in pytorch-quantization's quantizers, shared, checked, saved, and summed over processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL, QuantDescriptor
from torch import nn

from lean.amax import choose_amax
from lean.errors import QuantizationError
from lean.histogram import Histogram
from lean.observer import FiniteCheck, HistogramObserver, install_observers
from tests.lean import distributed_observing

ROOT = Path(__file__).resolve().parents[2]


class Twin(nn.Module):
    """Two convolutions; what they take is quantised, the second time by a quantizer with two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = quant_nn.QuantConv2d(3, 4, 3)
        self.second = quant_nn.QuantConv2d(4, 4, 3)
        self.alias = self.second._input_quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.second(x) + self.alias(x[..., 1:-1, 1:-1])


@pytest.fixture
def model() -> Twin:
    model = Twin()
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable_quant()
    return model


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    return {name: m for name, m in model.named_modules() if name.endswith("_input_quantizer")}


def calibrating(model: nn.Module, device: str = "cpu"):
    model.to(device)
    observers = install_observers(quantizers(model))
    for quantizer in quantizers(model).values():
        quantizer.enable_calib()
    return observers


def frames(count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(1, 3, 12, 14, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_quantizers_collect_what_they_are_given(model):
    observers = calibrating(model)
    with torch.no_grad():
        inner = model.first(frames(1)[0]).relu()
        for observer in (q._calibrator for q in quantizers(model).values()):
            observer.reset()
        model(frames(1)[0])
    found = observers.statistics()
    assert list(found) == ["first._input_quantizer", "second._input_quantizer"]
    assert found["first._input_quantizer"] == Histogram.from_values(frames(1)[0].numpy())
    both = Histogram.from_values(inner.numpy()) + Histogram.from_values(inner[..., 1:-1, 1:-1].numpy())
    assert found["second._input_quantizer"] == both, "a shared quantizer has to count the tensors of all its names"
    assert found["first._input_quantizer"].has_negative
    assert not found["second._input_quantizer"].has_negative


def test_it_stands_in_for_the_librarys_calibrator(model):
    observers = calibrating(model)
    model(frames(1)[0])
    quantizer = model.first._input_quantizer
    assert isinstance(quantizer._calibrator, HistogramObserver)
    for method in ("mse", "entropy", "percentile", "max"):
        quantizer.load_calib_amax(method)
        assert quantizer.amax.item() == choose_amax(observers.statistics(), method)["first._input_quantizer"]
    quantizer.load_calib_amax("percentile", percentile=50.0)
    assert quantizer.amax < 1
    quantizer._calibrator.reset()
    assert quantizer._calibrator.compute_amax() is None
    assert quantizer._calibrator.statistics == Histogram.empty()
    assert observers.statistics()["second._input_quantizer"].total > 0, "only one quantizer was to forget"


def test_resuming_gives_what_an_uninterrupted_run_gives(model):
    observers = calibrating(model)
    for frame in frames():
        model(frame)
    whole = observers.statistics()
    observers = calibrating(model)
    for frame in frames()[:2]:
        model(frame)
    saved = {name: dict(h.to_dict()) for name, h in observers.statistics().items()}
    observers = calibrating(model)
    observers.load({name: Histogram.from_dict(arrays) for name, arrays in saved.items()})
    for frame in frames()[2:]:
        model(frame)
    assert observers.statistics() == whole


def test_statistics_are_copies(model):
    observers = calibrating(model)
    model(frames(1)[0])
    before = observers.statistics()["first._input_quantizer"]
    total = before.total
    model(frames(1)[0])
    assert before.counts.sum() == total


def test_statistics_of_another_model_are_refused(model):
    observers = calibrating(model)
    with pytest.raises(QuantizationError, match="quantizer other is only in the saved statistics"):
        observers.load(observers.statistics() | {"other": Histogram.empty()})
    with pytest.raises(QuantizationError, match=r"quantizer first\._input_quantizer is only in the model"):
        observers.load({"second._input_quantizer": Histogram.empty()})


@pytest.mark.parametrize(("value", "text"), [(np.nan, "1 NaN"), (np.inf, r"1 \+Inf"), (-np.inf, "1 -Inf")])
def test_non_finite_values_are_reported_with_quantizer_and_frame(model, value, text):
    observers = calibrating(model)
    finite = FiniteCheck(observers)
    model(frames(1)[0])
    finite.after("frame 7")
    finite.finish()
    bad = frames(1)[0]
    bad[0, 0, 3, 3] = value
    model.first._input_quantizer(bad)
    with pytest.raises(QuantizationError, match=rf"first\._input_quantizer got .*{text}.* in frame 8"):
        finite.after("frame 8")


def test_a_quantizer_per_channel_is_refused():
    per_channel = TensorQuantizer(QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL)
    with pytest.raises(QuantizationError, match=r"weights is per channel \(axis 0\)"):
        install_observers({"weights": per_channel})


def test_an_unsigned_quantizer_refuses_negative_values_by_name():
    quantizer = TensorQuantizer(QuantDescriptor(unsigned=True), if_quant=False, if_calib=True)
    install_observers({"after relu": quantizer})
    quantizer(torch.tensor([1.0, 2.0]))
    assert quantizer._calibrator.compute_amax("max") == 2
    quantizer(torch.tensor([-1.0]))
    with pytest.raises(QuantizationError, match="after relu are unsigned and saw values below zero"):
        quantizer._calibrator.compute_amax("max")


@pytest.mark.gpu
def test_the_gpu_collects_without_synchronising_and_counts_the_same(model):
    observers = calibrating(model, "cuda")
    finite = FiniteCheck(observers)
    batch = [frame.cuda() for frame in frames()]
    model(batch[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, frame in enumerate(batch[1:]):
            model(frame)
            finite.after(f"frame {number}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finite.finish()
    expected = Histogram.from_values(torch.cat(frames()).numpy())
    assert observers.statistics()["first._input_quantizer"] == expected


@pytest.mark.gpu
def test_the_gpu_reports_non_finite_values_a_frame_later_by_the_right_name(model):
    observers = calibrating(model, "cuda")
    finite = FiniteCheck(observers)
    model.first._input_quantizer(torch.full((4,), float("nan"), device="cuda"))
    finite.after("frame 1")
    model(frames()[0].cuda())
    with pytest.raises(QuantizationError, match=r"4 NaN, .* in frame 1"):
        finite.after("frame 2")


def test_three_processes_have_the_statistics_of_one(tmp_path):
    """Two processes get a frame each, one none; the sums equal those of one process, bit for bit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD": "3"}
    environment |= {"RENDEZVOUS": (tmp_path / "rendezvous").as_uri(), "RESULT": str(tmp_path / "sums.npz")}
    script = [sys.executable, distributed_observing.__file__]
    runs = [
        subprocess.Popen(script, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], errors
    alone = distributed_observing.observe(rank=0, world=1).statistics(summed=True)
    with np.load(tmp_path / "sums.npz") as sums:
        for name, histogram in alone.items():
            saved = Histogram.from_dict({key: sums[f"{name}/{key}"] for key in histogram.to_dict()})
            assert saved == histogram
            assert choose_amax({name: saved}) == choose_amax({name: histogram})
