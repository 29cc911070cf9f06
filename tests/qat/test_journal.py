"""Rows that outlive an interrupted run."""

import json

import pytest

from lean.errors import QuantizationError
from qat.journal import Journal

MADE = {"checkpoint": "abc", "frames": ["a", "b"]}


@pytest.fixture
def path(tmp_path):
    """A journal of two rows."""
    path = tmp_path / "rows.jsonl"
    with Journal(path, MADE) as journal:
        journal.add("a 1", {"x": 1.5})
        journal.add("a 2", [0.1])
    return path


def test_rows_are_gone_on_from(path):
    with Journal(path, MADE, resume=True) as journal:
        assert journal.rows == {"a 1": {"x": 1.5}, "a 2": [0.1]}
        journal.add("b 1", None)
    assert list(Journal(path, MADE, resume=True).rows) == ["a 1", "a 2", "b 1"]


def test_a_torn_line_is_cut_off(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key":"b 1","ro')
    with Journal(path, MADE, resume=True) as journal:
        assert list(journal.rows) == ["a 1", "a 2"]
        journal.add("b 1", 3)
    assert path.read_bytes().startswith(whole)
    assert Journal(path, MADE, resume=True).rows["b 1"] == 3


@pytest.mark.parametrize("left", [0, 5])
def test_a_torn_first_line_is_a_fresh_start(path, left):
    path.write_bytes(path.read_bytes()[:left])
    with Journal(path, MADE, resume=True) as journal:
        assert journal.rows == {}
        journal.add("a 1", 1)
    assert Journal(path, MADE, resume=True).rows == {"a 1": 1}


def test_without_resume_it_starts_anew(path):
    Journal(path, {"checkpoint": "other"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"made_of": {"checkpoint": "other"}}]


def test_rows_of_another_run_are_refused_and_left_alone(path):
    before = path.read_bytes()
    with pytest.raises(QuantizationError, match=r"comes from another run: checkpoint was abc, now it is xyz"):
        Journal(path, {**MADE, "checkpoint": "xyz"}, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["not json\n", "[]\n", '{"made_of": {}}\n{"row": 1}\n'])
def test_other_files_are_refused(path, content):
    path.write_text(content)
    with pytest.raises(QuantizationError, match="remove it to start anew"):
        Journal(path, MADE, resume=True)


def test_a_folder_that_can_not_be_written_to(tmp_path):
    with pytest.raises(QuantizationError, match="can't write there"):
        Journal(tmp_path / "absent" / "rows.jsonl", MADE)
