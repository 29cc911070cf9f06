"""Work shared out over forked processes."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from lean.errors import QuantizationError
from qat.parallel import share_out


def gather(tasks, work, processes=2) -> list:
    found = []
    share_out(tasks, work, found.append, processes)
    return found


def test_everything_that_is_emitted_arrives_and_no_process_stays():
    found = gather(range(5), lambda task, emit: [emit((task, part, os.getpid())) for part in "ab"])
    assert sorted((task, part) for task, part, _ in found) == [(task, part) for task in range(5) for part in "ab"]
    assert len({process for *_, process in found} - {os.getpid()}) == 2
    assert not multiprocessing.active_children()


def test_a_process_computes_on_one_thread_after_its_parent_has_used_several():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def product(size: int) -> float:
        return torch.ones(size, size).mm(torch.ones(size, size))[0, 0].item()

    try:
        product(1000)
        found = gather([3, 4], lambda n, emit: emit((torch.get_num_threads(), product(n))))
    finally:
        torch.set_num_threads(threads)
    assert {used for used, _ in found} == {1}
    assert sorted(value for _, value in found) == [3, 4]


def test_an_error_ends_all_of_them():
    def work(task, emit):
        if task:
            raise QuantizationError("frame 1 is no good")
        time.sleep(600)

    with pytest.raises(QuantizationError, match="frame 1 is no good"):
        gather([0, 1], work)
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_noticed():
    with pytest.raises(QuantizationError, match=r"a process has died \(exit code -9\)"):
        gather([0, 1], lambda task, emit: os.kill(os.getpid(), signal.SIGKILL))


def test_what_receives_may_stop_it():
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share_out([0, 1], lambda task, emit: (emit(task), time.sleep(600)), stop, 2)
    assert not multiprocessing.active_children()
