"""Running the calibration frames through the model: progress, saving on the way, going on, several processes."""

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from bevfusion.data import calibration_loader, to_device
from bevfusion.errors import InputError
from lean.calibrate import Forward, input_quantizers, model_device, observe, observing
from lean.distributed import gathered, rank, world
from lean.errors import QuantizationError
from lean.matching import matches
from lean.observer import FiniteCheck, Observers
from lean.statistics import Statistics
from qat.frames import Frames
from qat.stopping import deferred_signals, explained_failures, first_forward

Place = tuple[int, int]  # a frame's position in the run, and its index in the data set

logger = logging.getLogger("qat")


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

    Where `frames.skip_bad`, frames that can't be read are replaced by spares, in the order of their positions, after
    all others have run: that depends neither on workers nor on processes. The `made_of` of the statistics then holds
    the frames that ran, and `replaced`: token -> token of the frame that ran instead, None if there was none left.

    Args:
        made_of: what the statistics depend on, see `Statistics`.
        partial: file that keeps what was collected when the run is interrupted, and every `save_every` frames (0: not).
        resume: go on from `partial` if it is there.
        workers: data loading processes of each process.

    Raises:
        InputError: a frame can't be read, or a data loading process was killed.
        QuantizationError: NaN or infinity in a frame, memory ran out, `partial` comes from another run or can't be
            written, or another process of the run has died.
        KeyboardInterrupt: the user stopped it; a run of one process has saved what it has then.
    """
    start = _saved(partial, made_of) if resume and partial.exists() else Statistics({}, 0, made_of)
    total = len(frames.indices)
    places = [(position, frames.indices[position]) for position in range(start.frames + rank(), total, world())]
    kept = start.frames
    with _hint(partial, lambda: kept), observing(model) as observers, deferred_signals() as asked:
        run = _Run(model, frames, observers, workers)
        if rank() == 0:
            run.unreadable += start.made_of.get("unreadable", ())
            if start.frames:
                observers.load(start.histograms)

        def save(done: int) -> None:
            nonlocal kept
            run.finite.finish()
            found, unreadable = observers.statistics(summed=True), sorted(gathered(run.unreadable))
            if rank() == 0:
                Statistics(found, done, {**made_of, "unreadable": unreadable}).save(partial)
            kept = done

        def after_frame(number: int) -> None:
            done = start.frames + number * world()  # by all processes, as all have as many
            if asked() and world() == 1:
                save(done)
                raise asked()
            if save_every and done < total and number * world() % save_every < world():
                save(done)

        run(places, "calibrate", after_frame)
        ran = list(frames.indices)
        if bad := sorted(gathered(run.unreadable)):
            save(total)
            ran = _replace(run, bad, asked)
        return Statistics(observers.statistics(summed=True), total, _ran(made_of, frames, ran))


@dataclass
class _Run:
    """Runs frames through a model whose quantizers observe.

    Attributes:
        unreadable: positions of the frames that could not be read.
        works: whether a frame has run.
    """

    model: nn.Module
    frames: Frames
    observers: Observers
    workers: int
    unreadable: list[int] = field(default_factory=list)
    works: bool = False

    def __post_init__(self) -> None:
        self.finite = FiniteCheck(self.observers)

    def __call__(self, places: Sequence[Place], title: str, after_frame: Callable[[int], None]) -> None:
        """Run the frames at `places`; `after_frame` is called with how many have run, and may raise."""
        if not places:
            return
        device, frames = model_device(self.model), self.frames
        indices = [index for _, index in places]
        loader = calibration_loader(
            frames.dataset, indices, workers=self.workers, seed=frames.seed, keep_errors=frames.skip_bad
        )
        at, run = places[0], forward_of(self.model)

        def forward(model: nn.Module, one: tuple[Place, Any]) -> None:
            nonlocal at
            at, batch = one
            if isinstance(batch, InputError):
                logger.warning("%s; another frame is taken instead", batch)
                self.unreadable.append(at[0])
            else:
                with nullcontext() if self.works else first_forward(f"frame {frames.token(at[1])}"):
                    run(model, batch)
                self.works = True

        def after_batch(number: int, _: Any) -> None:
            self.finite.after(f"frame {frames.token(at[1])}")
            after_frame(number)

        def progress(batches, total):
            return tqdm(batches, title, total, unit="frame", smoothing=0.1, disable=rank() > 0)

        with explained_failures(lambda: f"frame {frames.token(at[1])}", device):
            observe(self.model, zip(places, loader, strict=False), len(places), forward, progress, after_batch)
            self.finite.finish()


def _replace(run: _Run, bad: list[int], asked: Callable[[], type[BaseException] | None]) -> list[int | None]:
    """Run spares for the frames at positions `bad`, of all processes; the indices of what ran, None where nothing did.

    Raises:
        InputError: no frame of the run could be read, and there are no spares.
    """
    ran: list[int | None] = list(run.frames.indices)
    spares = iter(run.frames.spares)

    def after_frame(_: int) -> None:
        if asked():
            raise asked()

    while bad:
        chosen = dict(itertools.zip_longest(bad, itertools.islice(spares, len(bad))))
        for position, index in chosen.items():
            ran[position] = index
        places = [place for place in chosen.items() if place[1] is not None]
        run.unreadable.clear()
        run(places[rank() :: world()], "replace", after_frame)
        bad = sorted(gathered(run.unreadable))
    if not any(index is not None for index in ran):
        raise InputError(f"none of the {len(ran)} frames can be read, and no others are left")
    return ran


def _ran(made_of: Mapping[str, Any], frames: Frames, ran: Sequence[int | None]) -> dict[str, Any]:
    """`made_of` with the frames that ran."""
    tokens = [None if index is None else frames.token(index) for index in ran]
    replaced = {old: new for old, new in zip(frames.tokens, tokens, strict=True) if old != new}
    if not replaced:
        return dict(made_of)
    return {**made_of, "frames": [token for token in tokens if token is not None], "replaced": replaced}


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
def _hint(partial: Path, kept: Callable[[], int]) -> Iterator[None]:
    """Say how to go on, if something is kept of a run that was stopped."""
    how = f"{partial} keeps {{}} frames: the same command with --resume goes on"
    try:
        yield
    except KeyboardInterrupt:
        if rank() == 0 and kept():
            print(f"\n{how.format(kept())}", file=sys.stderr)
        raise
    except (InputError, QuantizationError) as error:
        if rank() == 0 and kept():
            raise type(error)(f"{error}; {how.format(kept())}") from error
        raise
