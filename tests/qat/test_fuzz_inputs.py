"""Damaged configs and info files: a run, or one line and exit status 2; never a traceback."""

from pathlib import Path

import pytest

from tests.qat.demo_samples import write_world
from tests.qat.fuzz_inputs import KINDS, pickle_bytes, run, undamaged_config, undamaged_infos, verdict


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damaged_input_is_refused_in_one_line_or_used(world, tmp_path, kind):
    for seed in range(2):
        done = run(world, tmp_path / "ptq.pth", kind, seed)
        assert verdict(done).kind in ("refused", "correct"), f"seed {seed}: {verdict(done).story}"


def test_undamaged_copies_are_used_and_a_truncated_one_is_not(world, tmp_path):
    assert run(world, tmp_path / "ptq.pth", undamaged_config, 0).status == 0
    assert run(world, tmp_path / "ptq.pth", undamaged_infos, 0).status == 0
    assert run(world, tmp_path / "ptq.pth", pickle_bytes, 0).status == 2
