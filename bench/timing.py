"""Timing for the benchmarks: medians over alternating repetitions, so that a busy machine slows all sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Row = tuple[str, str, str, str]  # what, how, milliseconds, ratio


def medians(tasks: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each task, run in turn `repeats` times after one untimed round."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(repeats + 1):
        for name, task in tasks.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            task()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def kernel_medians(tasks: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """As `medians`, but on CUDA the device's own time between events, free of the host's."""
    if device != "cuda":
        return medians(tasks, device, repeats)
    events = {name: [] for name in tasks}
    for round_ in range(repeats + 3):
        for name, task in tasks.items():
            torch.cuda._sleep(2_000_000)  # lets the host run ahead, so that launches don't show
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            task()
            stop.record()
            if round_ >= 3:
                events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def rows(what: str, times: dict[str, float], base: str) -> list[Row]:
    """Table rows with each time over that of `base`."""
    return [(what, name, f"{t:.3f}", f"{t / times[base]:.2f}") for name, t in times.items()]
