"""Running the calibration frames through the model: progress, saving on the way, going on, several processes."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from bevfusion.data import calibration_loader, to_device
from lean.calibrate import Forward, input_quantizers, model_device, observe, observing
from lean.distributed import rank, world
from lean.matching import matches
from lean.observer import Observers
from lean.statistics import Statistics
from qat.frames import Frames


def partial_file(save: Path) -> Path:
    """Where the statistics of an unfinished run lie, beside its result."""
    return save.with_name(f"{save.name}.partial.npz")


def collect(
    model: nn.Module,
    frames: Frames,
    made_of: Mapping[str, Any],
    partial: Path,
    *,
    resume: bool = False,
    save_every: int = 0,
    workers: int = 0,
) -> Statistics:
    """Let the model's input quantizers observe the frames; the processes of a run share them, and get all statistics.

    Args:
        made_of: what the statistics depend on, see `Statistics`.
        partial: file that keeps what was collected when the run is interrupted, and every `save_every` frames (0: not).
        resume: go on from `partial` if it is there.
        workers: data loading processes of each process.

    Raises:
        InputError: a frame can't be read.
        QuantizationError: NaN or infinity in a frame, `partial` comes from another run or can't be written, or another
            process of the run has died.
        KeyboardInterrupt: the user stopped it; a run of one process has saved what it has then.
    """
    start = _saved(partial, made_of) if resume and partial.exists() else Statistics({}, 0, made_of)
    total, positions = len(frames.indices), range(start.frames + rank(), len(frames.indices), world())
    loader = calibration_loader(
        frames.dataset, [frames.indices[i] for i in positions], batch_size=1, workers=workers, seed=frames.seed
    )

    def save(observers: Observers, done: int) -> None:
        statistics = Statistics(observers.statistics(summed=True), done, made_of)
        if rank() == 0:
            statistics.save(partial)

    def progress(batches, total):
        return tqdm(batches, "calibrate", total, unit="frame", smoothing=0.1, disable=rank() > 0)

    with _hint(partial), observing(model) as observers, _deferred_interrupt() as interrupted:
        if start.frames and rank() == 0:
            observers.load(start.histograms)

        def after_batch(number: int, _: Any) -> None:
            observers.check_finite(f"frame {frames.tokens[positions[number - 1]]}")
            done = start.frames + number * world()  # by all processes, as all have as many
            if interrupted() and world() == 1:
                save(observers, done)
                raise KeyboardInterrupt
            if save_every and done < total and number * world() % save_every < world():
                save(observers, done)

        if positions:
            observe(model, loader, len(positions), forward_of(model), progress, after_batch)
        return Statistics(observers.statistics(summed=True), total, made_of)


def forward_of(model: nn.Module) -> Forward:
    """What runs a collated batch through the model as far as there are quantizers: the head only if it has some."""
    device, quantizers = model_device(model), input_quantizers(model)
    run = model if any(matches(name, ["heads.*"]) for name in quantizers) else model.bev_map
    return lambda _, batch: run(**to_device(batch, device))


def _saved(partial: Path, made_of: Mapping[str, Any]) -> Statistics:
    statistics = Statistics.load(partial)
    statistics.refuse_other(made_of, f"--resume {partial}")
    print(f"going on after {statistics.frames} frames of {partial}")
    return statistics


@contextmanager
def _hint(partial: Path) -> Iterator[None]:
    """Say on interruption how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if rank() == 0 and partial.exists():
            print(f"\n{partial} keeps what was collected: the same command with --resume goes on", file=sys.stderr)
        raise


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the frame at hand be finished on Ctrl-C, so that its statistics are whole; a second Ctrl-C stops at once.

    Yields what tells whether it was pressed. Of several processes none can save alone: they stop at once.
    """
    if world() > 1:
        yield lambda: False
        return
    pressed = []

    def note(*_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        print("\nstopping after this frame; once more to stop now", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
