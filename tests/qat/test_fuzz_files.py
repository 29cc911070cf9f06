"""Some mutations of checkpoints and saved models; `python -m tests.fuzz_files --count 1000` tries more."""

import os
import time

from bevfusion.errors import InputError
from tests.fuzz_files import trials
from tests.fuzzing import judge, run

COUNT = int(os.environ.get("FUZZ_COUNT", "40"))


def test_mutated_files_are_read_right_or_refused_in_one_line(tmp_path, capsys):
    verdicts = run(trials(tmp_path), COUNT, seed=10_000)
    faults = {key: times for key, times in verdicts.items() if key[1] not in ("refused", "correct")}
    assert not faults, capsys.readouterr().out
    refused = sum(times for (_, kind), times in verdicts.items() if kind == "refused")
    assert refused > COUNT / 2
    assert verdicts.total() == COUNT


def test_a_reader_that_fails_is_found(tmp_path):
    path = tmp_path / "a"
    kinds = {
        "traceback": lambda: {}["missing"],
        "wrong result": lambda: False,
        "correct": lambda: True,
    }
    assert {kind: judge(read, path).kind for kind, read in kinds.items()} == {kind: kind for kind in kinds}


def test_a_refusal_has_to_name_the_file(tmp_path):
    def refuse(text):
        raise InputError(text)

    assert judge(lambda: refuse("no"), tmp_path / "a.pth").kind == "unclear refusal"
    assert judge(lambda: refuse("a.pth: no"), tmp_path / "a.pth").kind == "refused"


def test_a_hang_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzzing.SECONDS", 1)
    assert "a hang" in judge(lambda: time.sleep(30), tmp_path / "a").story
