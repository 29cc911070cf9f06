"""A report's data: what is refused, what is put together, and how it is written."""

import copy
import json
import subprocess
import sys

import pytest

from lean.errors import QuantizationError
from lean.report.files import check_folder, read, write
from lean.report.merge import merge
from lean.report.schema import check
from tests.conftest import ROOT
from tests.lean.report.samples import report


@pytest.fixture(scope="module")
def whole() -> dict:
    return report()


def test_a_whole_report_and_the_least_one_pass(whole):
    check(whole)
    check({key: whole[key] for key in ("format", "version", "title", "runs")})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: r.update(format="x"), "not a report"),
        (lambda r: r.update(version=99), "version 99"),
        (lambda r: r.pop("title"), "title is missing"),
        (lambda r: r.update(surprise=1), "surprise is unknown"),
        (lambda r: r["layers"][3].pop("sqnr"), r"layers\[3\].sqnr is missing"),
        (lambda r: r["layers"][0].update(sqnr=float("nan")), "sqnr should be a finite number, is nan"),
        (lambda r: r["layers"][0].update(state="int7"), "state should be int8"),
        (lambda r: r["layers"][0].update(bits=True), "bits should be a whole number"),
        (
            lambda r: r["pictures"][0]["views"][0].update(float="https://example.org/x.png"),
            "float should be data:image",
        ),
        (lambda r: r["colours"].update(car="red; background: url(x)"), "colours.car should be #"),
        (lambda r: r["tables"][0]["rows"][0].append([]), "should be a text or a number"),
        (lambda r: r.update(runs={}), "runs should be a list"),
    ],
)
def test_what_is_no_report_is_named(whole, damage, words):
    damaged = copy.deepcopy(whole)
    damage(damaged)
    with pytest.raises(QuantizationError, match=words):
        check(damaged)


def part(whole: dict, *keys: str, **changes: object) -> dict:
    return copy.deepcopy({key: whole[key] for key in ("format", "version", "title", "runs", "files", *keys)} | changes)


def test_runs_on_one_model_add_up(whole):
    first, second = part(whole, "layers", "quantizers", "notes"), part(whole, "scores", "notes", title="other")
    merged = merge(first, second)
    check(merged)
    assert merged["title"] == whole["title"]
    assert merged["runs"] == [*whole["runs"]]  # the same run twice counts once
    assert merged["notes"] == whole["notes"]
    assert merged["layers"] == whole["layers"]
    assert merged["scores"] == whole["scores"]
    assert merged["quantizers"] == whole["quantizers"]


def test_a_later_run_replaces_what_it_measured_again(whole):
    again = part(whole, scores=[dict(whole["scores"][0], mean_ap=0.1)])
    assert merge(whole, again)["scores"][0]["mean_ap"] == 0.1
    assert merge(whole, part(whole, tables=[]))["tables"] == whole["tables"]


def test_reports_of_two_models_are_not_mixed(whole):
    other = part(whole)
    other["files"][1]["sha256"] = "c" * 8
    with pytest.raises(QuantizationError, match="another int8 model"):
        merge(whole, other)
    merge(whole, part(whole, files=[whole["files"][0]]))


def test_writing_and_reading(whole, tmp_path):
    write(tmp_path / "a", whole)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["index.html", "report.json"]
    assert read(tmp_path / "a") == whole
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    write(tmp_path / "b", read(tmp_path / "a"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == first


def test_a_folder_in_use_is_refused_unless_forced(whole, tmp_path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path / "new")  # it is there now, and empty
    write(tmp_path / "new", whole)
    with pytest.raises(QuantizationError, match=r"--report .*new: exists and is not empty; --force"):
        check_folder(tmp_path / "new")
    check_folder(tmp_path / "new", force=True)
    check_folder(tmp_path / "new", add=True)


def test_places_where_no_report_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantizationError, match="is a file, name a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(QuantizationError, match="can't write there"):
        check_folder(tmp_path / "file" / "deep")
    with pytest.raises(QuantizationError, match="no report can be read there"):
        check_folder(tmp_path, add=True)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(QuantizationError, match="not valid JSON"):
        check_folder(tmp_path, add=True)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(QuantizationError, match="not a report"):
        check_folder(tmp_path, add=True)


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from lean.errors import QuantizationError
from lean.report.files import read, write
folder = Path(sys.argv[1])
report = read(folder)
size = (folder / "report.json").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))  # the page is larger, so only the data fits
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
report["title"] = "newer"
try:
    write(folder, report)
except QuantizationError as error:
    print(error)
"""


def test_both_files_are_written_or_none(whole, tmp_path):
    small = part(whole, title="older")
    write(tmp_path, small)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before["index.html"]) > len(before["report.json"]) + 10
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert "index.html was not written: the file would exceed the size limit" in done.stdout, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert json.loads(before["report.json"])["title"] == "older"
