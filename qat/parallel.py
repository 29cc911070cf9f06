"""Work shared out over forked processes, which use more cores than the threads of one."""

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import TypeVar

import torch

from bevfusion.processes import start_worker
from lean.errors import QuantizationError

Task, Item = TypeVar("Task"), TypeVar("Item")
Work = Callable[[Task, Callable[[Item], None]], None]


@dataclass(frozen=True)
class _Failure:
    """What a process sends when its work raised."""

    error: Exception


def share_out(tasks: Sequence[Task], work: Work, receive: Callable[[Item], None], processes: int) -> None:
    """Call `work(task, emit)` for all tasks, in `processes` processes, and `receive` in this one with what is emitted.

    Every process computes on one thread unless `work` takes more. What is emitted has to be picklable, plain data, and
    comes in no order between tasks.

    Raises:
        QuantizationError: a process has died. Whatever `work` or `receive` raise.
    """
    context = multiprocessing.get_context("fork")
    running: dict[connection.Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for number in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            running[ours] = context.Process(target=_serve, args=(tasks[number::processes], work, theirs), daemon=True)
            running[ours].start()
            theirs.close()
        while running:
            for pipe in connection.wait(list(running)):
                try:
                    item = pipe.recv()
                except EOFError:
                    _refuse_death(running.pop(pipe))
                    continue
                if isinstance(item, _Failure):
                    raise item.error
                receive(item)
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _serve(tasks: Sequence[Task], work: Work, pipe: connection.Connection) -> None:
    start_worker()
    torch.set_num_threads(1)  # the threads of the parent's pool don't survive a fork
    try:
        for task in tasks:
            work(task, pipe.send)
    except Exception as error:
        error.add_note(traceback.format_exc())
        pipe.send(_Failure(error))


def _refuse_death(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise QuantizationError(
            f"a process has died (exit code {process.exitcode}): if the system ran out of memory, end other programs"
        )
