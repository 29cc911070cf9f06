"""One run at a time writes a result: a second one is told so, and a killed one is in nobody's way."""

import signal
import subprocess
import sys

import pytest

from lean.errors import QuantizationError
from lean.lock import sole_writer
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from lean.lock import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock on `tmp_path/a.pth`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a.pth")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(QuantizationError, match=rf"another run is writing .*a\.pth \(process {holder.pid}\)"):
        sole_writer(tmp_path / "a.pth").__enter__()
    with sole_writer(tmp_path / "b.pth"):
        pass


def test_what_a_killed_run_leaves_behind_is_in_nobodys_way(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".a.pth.lock").exists()
    with sole_writer(tmp_path / "a.pth"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_dropped_on_an_exception(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), sole_writer(tmp_path / "a.pth"):
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(QuantizationError, match=r"absent/a\.pth: can't write there"):
        sole_writer(tmp_path / "absent" / "a.pth").__enter__()
