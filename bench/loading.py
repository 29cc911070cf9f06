"""Frames a second: loading alone, and loading with the observing forward behind it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from bench.timing import Row
from bench.whole_model import CONFIGS, ROOT, quantised
from bevfusion.config import load_config
from bevfusion.data import calibration_dataset, calibration_frames, calibration_loader
from bevfusion.data.loader import FrameLoader
from bevfusion.models import build_model
from lean.calibrate import observe, observing
from lean.observer import FiniteCheck
from lean.quantize import initialize, set_quantizer_fast
from qat.collection import forward_of
from qat.common import choose_workers

STOCK_FRAMES = 12  # of the slow side


def seconds_a_frame(batches: Iterable, run: Callable[[Iterable, int], None], frames: int, warm: int) -> float:
    """Mean time of the frames after the first `warm`, which start the workers and fill their queues."""
    iterator = iter(batches)
    run(iterator, warm)
    start = time.perf_counter()
    run(iterator, frames - warm)
    return (time.perf_counter() - start) / (frames - warm)


def consume(batches: Iterable, count: int) -> None:
    """Take `count` batches and leave them alone."""
    for _ in itertools.islice(batches, count):
        pass


def observer(model: nn.Module, device: str, stock: bool) -> Callable[[Iterable, int], None]:
    """What runs batches through an observing model, waiting for the device at the end."""

    def run(batches: Iterable, count: int) -> None:
        forward = forward_of(model)
        if stock:
            observe(model, batches, count, forward)
        else:
            with observing(model) as observers:
                finite = FiniteCheck(observers)
                observe(model, batches, count, forward, None, lambda number, _: finite.after(str(number)))
                finite.finish()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def rates(device: str, config: str | None, root: str, workers: list[int] | None, frames: int) -> list[Row]:
    """Rows with milliseconds a frame, and in place of a ratio frames a second."""
    initialize()
    options = [f"dataset_root={Path(root).resolve()}/"]
    cfg = load_config(ROOT / (config or CONFIGS[device]), options)
    dataset = calibration_dataset(cfg, "test")
    few = calibration_frames(dataset, 16, 0)
    torch.manual_seed(0)
    model = quantised(build_model(cfg["model"]).eval()).to(device)
    set_quantizer_fast(model)

    def loader(processes: int, count: int) -> FrameLoader:
        indices = list(itertools.islice(itertools.cycle(few), count))
        return calibration_loader(dataset, indices, workers=processes)

    found = []
    for processes in workers or (1, choose_workers(None, torch.device(device))):
        count = min(frames, STOCK_FRAMES * (1 + processes))
        found.append((f"load, {processes} workers", loader(processes, count), consume, count))
        run = observer(model, device, False)
        found.append((f"load and observe, lean, {processes} workers", loader(processes, count), run, count))
    run = observer(model, device, True)
    found.append(("load and observe, stock, 1 worker", loader(1, STOCK_FRAMES), run, STOCK_FRAMES))
    table = []
    for name, batches, consumer, count in found:
        seconds = seconds_a_frame(batches, consumer, count, min(4, count // 3))
        table.append(("frames from disk", name, f"{1e3 * seconds:.1f}", f"{1 / seconds:.2f}/s"))
    return table
