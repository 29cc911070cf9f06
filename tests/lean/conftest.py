"""Every test of this folder draws the same random numbers on every run, and computes on one thread.

spconv's own convolutions, which these tests use as plain float layers, race with more threads on a CPU. The slow tests
of whole models use the project's convolutions, which don't.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch's generator, and limit the quick tests to one thread."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if not request.node.get_closest_marker("slow"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
