"""What stops the run over frames from outside: Ctrl-C, SIGTERM, a worker that is killed, memory that runs out."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from bevfusion.errors import InputError, explaining
from lean.distributed import world
from lean.errors import QuantizationError
from qat.common import Terminated


@contextmanager
def deferred_signals() -> Iterator[Callable[[], type[BaseException] | None]]:
    """Let the frame at hand be finished on Ctrl-C or SIGTERM, so that its statistics are whole; a second stops at once.

    Yields what tells the exception that was asked for, None while there is none; it is raised at the end of the block.
    Of several processes none can save alone, and they wait for one another where no handler of Python's is called: they
    stop at once, on SIGTERM as the system does it.
    """
    asked: list[type[BaseException]] = []

    def note(number: int, _: FrameType | None) -> None:
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if asked:
            raise kind
        asked.append(kind)
        print("\nstopping after this frame; once more to stop now", file=sys.stderr)

    alone = world() == 1
    handlers = {signal.SIGINT: note, signal.SIGTERM: note} if alone else {signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise asked[0]


@contextmanager
def first_forward(frame: str) -> Iterator[None]:
    """Explain what the first forward of a run raises: there a config shows that doesn't fit itself or its data.

    Raises:
        InputError: says which frame, and what was raised.
    """
    try:
        yield
    except (InputError, QuantizationError):
        raise
    except Exception as error:
        if _worker_died(error) or _memory_is_full(error):
            raise
        with explaining(f"the network of this config can't compute {frame}", "check the config's sizes"):
            raise


@contextmanager
def explained_failures(frame: Callable[[], str], device: torch.device) -> Iterator[None]:
    """Turn the failures of a healthy program on a machine at its limits into errors that say what to do.

    Args:
        frame: tells what is being computed.

    Raises:
        InputError: a data loading process was killed.
        QuantizationError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if _worker_died(error):
            raise InputError(
                f"a data loading process has died ({error}): if the system ran out of memory, use fewer --workers"
            ) from error
        if _memory_is_full(error):
            raise QuantizationError(_out_of_memory(frame(), device)) from error
        raise


def _worker_died(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _memory_is_full(error: Exception) -> bool:
    """Whether torch, spconv or the system had no memory left."""
    signs = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _out_of_memory(frame: str, device: torch.device) -> str:
    where, ways = "memory", "end other programs"
    if device.type == "cuda":
        where, ways = "GPU memory", "end other programs on it (nvidia-smi lists them), use --device cpu"
        if torch.cuda.is_available():
            where += " ({} of {} MiB are free)".format(*(size // 2**20 for size in torch.cuda.mem_get_info(device)))
    return f"out of {where} in {frame}: {ways}, or lower the model's image size or max_voxels"
