"""The process that gets ready for verification while the run is at work."""

import pytest

from qat.common import VerificationError
from qat.fresh_process import FreshProcess


def test_it_does_what_it_is_asked_for(tmp_path):
    with FreshProcess("-c", "import pathlib; pathlib.Path(input()).write_text('done')") as process:
        process.start()
        process.ask(tmp_path / "answer")
        process.wait()
    assert (tmp_path / "answer").read_text() == "done"


def test_the_last_line_of_its_errors_says_why_it_failed():
    with FreshProcess("-c", "import sys; input(); sys.exit('a traceback\\nerror: no such layer')") as process:
        process.start()
        process.ask("anything")
        with pytest.raises(VerificationError, match=r"can't load and run what was saved: no such layer$"):
            process.wait()


def test_one_that_died_before_it_was_asked_is_noticed():
    with FreshProcess("-c", "import os; os._exit(7)") as process:
        process.start()
        process._process.wait()
        process.ask("anything")
        with pytest.raises(VerificationError, match="exit status 7"):
            process.wait()


def test_it_ends_with_the_block():
    with pytest.raises(KeyboardInterrupt), FreshProcess("-c", "import time; time.sleep(600)") as process:
        process.start()
        raise KeyboardInterrupt
    assert process._process.poll() is not None


def test_it_sees_that_the_run_is_gone(tmp_path):
    """Its standard input closes with the process that started it, however that ended."""
    heard = tmp_path / "heard"
    with FreshProcess("-c", f"import sys; open({str(heard)!r}, 'w').write(sys.stdin.read())") as process:
        process.start()
        process._process.stdin.close()
        process.wait()
    assert heard.read_text() == ""
