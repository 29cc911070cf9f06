"""Statistics as files: they come back as they were, and say what differs from another run's."""

import numpy as np
import pytest

from lean.errors import QuantizationError
from lean.histogram import Histogram
from lean.statistics import Statistics, differences

MADE_OF = {"checkpoint": "abc", "frames": ["a", "b"], "config": {"model": {"width": 8, "bins": [1, 2]}}, "seed": 0}


@pytest.fixture
def statistics():
    rng = np.random.default_rng(0)
    return Statistics({f"layer{i}": Histogram.from_values(rng.standard_normal(500)) for i in range(3)}, 2, MADE_OF)


def test_a_file_gives_back_what_was_saved(statistics, tmp_path):
    statistics.save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz")
    assert loaded == statistics
    assert list(loaded.histograms) == list(statistics.histograms)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_one_file_replaces_another(statistics, tmp_path):
    statistics.save(tmp_path / "s.npz")
    Statistics({}, 0, {}).save(tmp_path / "s.npz")
    assert Statistics.load(tmp_path / "s.npz") == Statistics({}, 0, {})


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "other", "old"])
def test_files_that_can_not_be_used_are_refused(statistics, tmp_path, damage):
    path = tmp_path / "s.npz"
    statistics.save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "text":
        path.write_text("statistics")
    elif damage == "other":
        np.savez(path, a=np.zeros(3))
    else:
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **(arrays | {"layout": arrays["layout"] + 1}))
    with pytest.raises(QuantizationError, match=r"not found|damaged|another version") as caught:
        Statistics.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "abd"}, "checkpoint was abc, now it is abd$"),
        ({"frames": ["a", "c"]}, r"frames\.1 was b, now it is c$"),
        ({"frames": ["a"]}, "frames was 2 items, now it is 1 items$"),
        ({"config": {"model": {"width": 9, "bins": [1, 2]}}}, r"config\.model\.width was 8, now it is 9$"),
        ({"config": {"model": {"width": 9, "bins": [3, 2]}}}, r"\(and 1 more differences\)$"),
        ({"pipeline": "test"}, "pipeline was None, now it is test$"),
    ],
)
def test_another_run_is_refused_with_the_difference(statistics, change, message):
    with pytest.raises(QuantizationError, match=rf"^s\.npz comes from another run: {message}|{message}"):
        statistics.refuse_other(MADE_OF | change, "s.npz")


def test_the_same_run_is_accepted_and_only_what_is_asked_for_compared(statistics):
    statistics.refuse_other({**MADE_OF, "frames": ("a", "b")}, "s.npz")
    statistics.refuse_other({"checkpoint": "abc"}, "s.npz")


def test_differences_are_those_of_the_leaves():
    assert list(differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]})) == [("a.1.b", "2", "3")]
    assert list(differences(MADE_OF, MADE_OF)) == []
