"""`--report` of the scripts: what is in a report, and what is said of places where none can be written."""

import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from lean.report.files import read
from lean.report.schema import FORMAT, VERSION, check
from qat import common, ptq, report
from qat.arguments import DEFAULT_CONFIG
from qat.model_report import mixed_table
from tests.conftest import ROOT
from tests.qat.ptq_samples import NO_VERIFY, Outcome, link_frame, options, with_reduced_model


def run(script: ModuleType, *arguments: object) -> Outcome:
    """Run a script in this process, which spares its imports."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"qat/{script.__name__.removeprefix('qat.')}.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        common.run(script.main)
    return Outcome(stopped.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def root(tmp_path_factory, realframe, golden) -> Path:
    """A data root of two copies of the real keyframe, with the reduced model's checkpoint."""
    folder = link_frame(tmp_path_factory.mktemp("data") / "nuscenes", realframe, golden, frames=2)
    return with_reduced_model(folder)


def quantise(root: Path, out: Path, *more: object) -> Outcome:
    """Quantise the float checkpoint into `out`."""
    arguments = ["--config", ROOT / DEFAULT_CONFIG, "--ckpt", root / "float.pth", "--dataset-root", root]
    arguments += ["--device", "cpu", "--workers", 0, "--calib-pipeline", "test", "--calibrate_batch", 1, *NO_VERIFY]
    return run(ptq, *arguments, "--save", out / "ptq.pth", "--cfg-options", *options(root), *more)


@pytest.fixture(scope="module")
def made(root, tmp_path_factory) -> Path:
    """A folder with a quantised model, its statistics, and its report."""
    out = tmp_path_factory.mktemp("out")
    more = ["--stats", out / "stats.npz", "--report", out / "report", "--report-frames", 1, "--disable", "fuser.0"]
    done = quantise(root, out, *more)
    assert done.status == 0, done.err
    assert f"report: {out / 'report' / 'index.html'}" in done.out
    return out


def test_a_report_of_ptq(made, root):
    found = read(made / "report")
    assert (made / "report" / "index.html").stat().st_size < 1_000_000
    layers = {layer["name"]: layer for layer in found["layers"]}
    inside = {name for name, layer in layers.items() if layer["state"] == "int8"}
    assert len(inside) > 100
    assert all(layers[name]["sqnr"] is not None for name in inside)
    assert layers["encoders.camera.backbone.conv1"]["macs"] == 6 * 32 * 88 * 8 * 3 * 49
    assert layers["heads.object.decoder.0.self_attn"]["macs"] > 0
    assert layers["fuser.0"]["why"] == "--disable"
    assert layers["decoder.neck.deblocks.0.0"]["why"] == "the recipe disables it"
    assert {layers[name]["quantizer"] for name in inside} <= set(found["quantizers"])
    assert all(chart["total"] > 0 and chart["errors"] for chart in found["quantizers"].values())
    assert {one["path"] for one in found["branches"]} >= {"encoders.camera", "fuser", "decoder"}
    assert found["drift"]["groups"][0]["rows"][0]["values"][0] == 20  # the reduced model's proposals
    assert [view["title"] for view in found["pictures"][0]["views"]] == ["Cameras", "Bird's-eye view"]
    assert len(found["calibration"]["tokens"]) == 1
    assert found["notes"] == []


def test_a_report_says_how_it_was_made(made, root):
    found = read(made / "report")
    (entry,) = found["runs"]
    assert entry["command"].startswith("python qat/ptq.py --config")
    assert f"--report {made / 'report'}" in entry["command"]
    assert [step["name"] for step in entry["steps"]][-1] == "report"
    assert entry["settings"]["amax of inputs"] == "mse"
    assert {"python", "torch", "pytorch-quantization"} <= set(entry["versions"])
    digests = {Path(one["name"]).name: one["sha256"] for one in found["files"]}
    assert digests == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (root / "float.pth", made / "ptq.pth", made / "ptq.safetensors")
    }


def test_ranges_chosen_anew_without_data_are_reported_as_far_as_they_can(made, root, tmp_path):
    nothing = ["data.val.ann_file=/nonexistent/val.json", "data.train.dataset.ann_file=/nonexistent/train.json"]
    more = ["--from-stats", made / "stats.npz", "--method", "max", "--report", tmp_path / "report"]
    done = quantise(root, tmp_path, *more, "--cfg-options", *nothing)
    assert done.status == 0, done.err
    found = read(tmp_path / "report")
    assert "/nonexistent/train.json" in found["notes"][0]
    assert "pictures" not in found
    assert all(chart["clipped"] == 0 for chart in found["quantizers"].values())
    assert {layer["sqnr"] for layer in found["layers"]} == {None}


def describe(root: Path, ckpt: Path, *more: object) -> Outcome:
    """Run `qat/report.py`."""
    arguments = ["--config", ROOT / DEFAULT_CONFIG, "--ckpt", ckpt, "--dataset-root", root, "--device", "cpu"]
    return run(report, *arguments, "--workers", 0, "--cfg-options", *options(root), *more)


def test_a_report_on_a_saved_model_says_the_same(made, root, tmp_path):
    more = ["--stats", made / "stats.npz", "--report", tmp_path / "report", "--report-frames", 1]
    done = describe(root, made / "ptq.safetensors", *more)
    assert done.status == 0, done.err
    first, second = read(made / "report"), read(tmp_path / "report")
    for found in (first, second):  # a model built from its file has the head's layers in another order
        found["layers"].sort(key=lambda layer: layer["name"])
    for section in ("layers", "quantizers", "branches", "drift", "calibration", "measured"):
        assert first[section] == second[section], section


def test_a_report_is_added_to_one_of_the_same_model_only(made, root, tmp_path):
    found = read(made / "report")
    for file in found["files"]:
        file["sha256"] = "0" * 64
    (tmp_path / "report.json").write_text(json.dumps(found))
    done = describe(root, made / "ptq.safetensors", "--report", tmp_path, "--add")
    assert done.status == 2
    assert "the report is of another int8 model" in done.err
    assert json.loads((tmp_path / "report.json").read_text()) == found


def test_a_float_model_is_refused(root, tmp_path):
    done = describe(root, root / "float.pth", "--report", tmp_path / "report")
    assert done.status == 2
    assert "is not a quantised model of qat/ptq.py" in done.err


def in_use(folder: Path) -> list:
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("what was there")
    return ["--report", folder / "report"]


def a_file(folder: Path) -> list:
    (folder / "report").write_text("what was there")
    return ["--report", folder / "report"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (in_use, ["--report", "exists and is not empty", "--force"]),
        (a_file, ["--report", "is a file"]),
        (lambda folder: ["--report", "/proc/nowhere/report"], ["--report", "/proc/nowhere"]),
        (lambda folder: ["--force"], ["--force", "--report DIR"]),
        (lambda folder: ["--report", folder / "r", "--report-frames", "x"], ["--report-frames"]),
    ],
)
def test_places_for_a_report_are_looked_at_first(root, tmp_path, arguments, words):
    done = quantise(root, tmp_path, *arguments(tmp_path))
    assert done.status == 2, done.out
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert "calibrate" not in done.out
    assert not (tmp_path / "ptq.pth").exists()


def test_an_older_report_is_replaced_by_force(made, root, tmp_path):
    more = [*in_use(tmp_path), "--force", "--from-stats", made / "stats.npz", "--report-frames", 0]
    done = quantise(root, tmp_path, *more)
    assert done.status == 0, done.err
    assert "what was there" not in (tmp_path / "report" / "index.html").read_text()
    assert "no frames were run" in read(tmp_path / "report")["notes"][0]


def test_what_was_left_in_float_automatically_is_a_table():
    auto = {
        "metric": "drift",
        "target": 0.2,
        "frames": [4, 8],
        "searched": [0.5, 0.1],
        "verified": [0.6, 0.3],
        "share": [1.0, 0.97],
        "share_of_all": [0.8, 0.776],
        "kept": False,
        "measurements": 7,
        "layers": ["a.b"],
    }
    table = mixed_table(auto)
    check({"format": FORMAT, "version": VERSION, "title": "", "runs": [], "tables": [table]})
    assert "not met" in table["note"]
    assert "a.b" in table["note"]
    assert table["rows"][2] == ["MACs in INT8, of what can be quantised (%)", 100.0, 97.0]
