"""Damaged configs and info files: a run, or one line and exit status 2; never a traceback."""

from collections import Counter
from pathlib import Path

import pytest

from tests.qat.demo_samples import write_world
from tests.qat.fuzz_inputs import KINDS, problem, run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("damage", KINDS, ids=lambda damage: damage.__name__)
def test_damaged_input_is_refused_in_one_line_or_used(world, tmp_path, damage):
    statuses = Counter()
    for seed in range(4):
        done = run(world, tmp_path / "ptq.pth", damage, seed)
        assert problem(done) is None, f"seed {seed}: {problem(done)}"
        statuses[done.status] += 1
    assert statuses[2] > 0
