"""`qat/sensitivity.py` on a tiny data set and a small LiDAR model; replays of a reduced camera + LiDAR model."""

import contextlib
import csv
import io
import json
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmcv.parallel import MMDataParallel

from bevfusion.config import load_config
from bevfusion.create_data import create_data
from bevfusion.models import build_model
from lean.bevfusion_recipe import default_recipe, outputs_of
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.quantize import calibrate_model
from lean.report.files import read
from lean.sensitivity import run_trials, sensitivity_units, unit_quantizers
from lean.sqnr import noise_between
from lean.switches import disable_layers, named_quantizers, quantizer_flags
from qat import common, parallel, sensitivity
from qat.arguments import DEFAULT_CONFIG
from qat.journal import Journal
from qat.preparing import quantised_model
from tests.bevfusion import tiny_nuscenes as tiny
from tests.conftest import ROOT
from tests.golden_model import golden_batch
from tests.qat.ptq_samples import REDUCED, Outcome

CONFIG = ROOT / "configs/nuscenes/det/transfusion/secfpn/lidar/voxelnet_0p075.yaml"
OPTIONS = REDUCED[1:3] + REDUCED[-1:]  # those of the LiDAR and the head
BLOCK = "encoders.lidar.backbone.encoder_layers.encoder_layer1.1"
DEBLOCKS = ("decoder.neck.deblocks.0.0", "decoder.neck.deblocks.1.0")  # the recipe leaves the first in float
ONLY = (f"{BLOCK}.*", "decoder.neck.*")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data root with a float checkpoint of random weights."""
    folder = tiny.TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(folder, "v1.0-mini", database=False)
    torch.manual_seed(0)
    torch.save({"state_dict": build_model(load_config(CONFIG, OPTIONS)["model"]).state_dict()}, folder / "float.pth")
    return folder


def arguments(root: Path, out: Path, *more: object) -> list[str]:
    given = ["--config", CONFIG, "--ckpt", root / "float.pth", "--dataset-root", root, "--out", out, "--frames", 2]
    given += ["--calibrate_batch", 2, "--calib-pipeline", "test", "--device", "cpu", "--workers", 0, "-q"]
    return list(map(str, [*given, "--cfg-options", *OPTIONS, *more]))


def run(root: Path, out: Path, *more: object) -> Outcome:
    """Run `qat/sensitivity.py` in this process, which spares its imports."""
    printed, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["sensitivity.py", *arguments(root, out, *more)]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        common.run(sensitivity.main)
    return Outcome(stopped.value.code or 0, printed.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> dict:
    """The result of an uninterrupted run with official scores, and what was printed."""
    out = tmp_path_factory.mktemp("whole") / "result.json"
    report = tmp_path_factory.mktemp("report")
    more = ("--metric", "mAP", "--only", *ONLY, "--stats", out.with_name("stats.npz"), "--report", report)
    done = run(root, out, *more)
    assert done.status == 0, done.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["result.csv", "result.json", "stats.npz"]
    return {"out": out, "text": done.out, "report": report, **json.loads(out.read_text())}


def test_every_unit_is_tried_both_ways(whole):
    assert whole["outputs"] == ["lidar", "decoder", "heatmap"]
    assert len(whole["frames"]) == 2
    names = {unit["name"] for unit in whole["units"]}
    assert names == {*(f"{BLOCK}.{leaf}" for leaf in ("conv1", "conv2", "add")), *DEBLOCKS}
    assert len(whole["units"]) == len(names)
    for unit in whole["units"]:
        is_decoder = unit["name"].startswith("decoder")
        assert (unit["alone"]["errors"]["lidar"] == 0) == is_decoder
        assert 0 < unit["alone"]["errors"]["heatmap"] < 1
        assert (unit["without"] is None) == unit["left_float"] == (unit["name"] == DEBLOCKS[0])
        assert all(5 < sqnr["both"] < 80 for sqnr in unit["sqnr_db"].values())
        assert unit["alone"]["drift"]["boxes"] == 40
        assert set(unit["alone"]["drift"]["by_class"]) == set(whole["classes"])
        assert 0 <= unit["alone"]["scores"]["mAP"] <= 1
    assert whole["int8"]["errors"]["decoder"] > max(unit["alone"]["errors"]["decoder"] for unit in whole["units"]) / 2


def test_units_are_sorted_by_the_metric(whole):
    def cost(unit: dict) -> tuple[float, float]:
        return whole["float"]["scores"]["mAP"] - unit["alone"]["scores"]["mAP"], unit["alone"]["drift"]["disagreement"]

    costs = [cost(unit) for unit in whole["units"]]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] != costs[-1]


def test_table_and_csv_hold_the_same(whole):
    rows = list(csv.DictReader(whole["out"].with_suffix(".csv").open()))
    assert [row["name"] for row in rows] == [unit["name"] for unit in whole["units"]]
    first = whole["units"][0]
    assert float(rows[0]["alone_error_heatmap"]) == first["alone"]["errors"]["heatmap"]
    assert float(rows[0]["alone_mAP"]) == first["alone"]["scores"]["mAP"]
    assert next(row for row in rows if row["left_float"] == "1")["without_recall"] == ""
    lines = [line for line in whole["text"].splitlines() if first["name"] in line]
    assert len(lines) == 1
    assert f"{100 * first['alone']['errors']['heatmap']:.2f}" in lines[0]
    assert "| all quantised" in whole["text"]


def test_the_report_holds_the_table_and_the_layers(whole):
    report = read(whole["report"])
    (table,) = report["tables"]
    titles = [column["title"] for column in table["columns"]]
    first, row = whole["units"][0], table["rows"][0]
    assert row[0] == ", ".join(first["layers"])
    assert row[titles.index("heatmap (%)")] == 100 * first["alone"]["errors"]["heatmap"]
    assert row[titles.index("mAP (%)")] == 100 * first["alone"]["scores"]["mAP"]
    assert [len(cells) for cells in table["rows"]] == [len(titles)] * (len(whole["units"]) + 1)
    measured = {layer["name"]: layer["sqnr"] for layer in report["layers"] if layer["sqnr"] is not None}
    assert measured == {
        name: parts["both"]
        for unit in whole["units"]
        if not unit["left_float"]
        for name, parts in unit["sqnr_db"].items()
    }
    assert report["drift"]["groups"][0]["rows"][0]["values"][0] == whole["int8"]["drift"]["boxes"]
    assert [file["role"] for file in report["files"]] == ["float"]


def unlike(document: dict) -> dict:
    """A result without what differs between equal runs."""
    return {key: value for key, value in document.items() if key not in ("out", "text", "report", "command")}


@contextlib.contextmanager
def interrupted_after(rows: int) -> Iterator[None]:
    """Press Ctrl-C when the journal has got this many rows."""
    add, added = Journal.add, []

    def add_and_press(self: Journal, key: str, row: object) -> None:
        add(self, key, row)
        added.append(key)
        if len(added) == rows:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with mock.patch.object(Journal, "add", add_and_press):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_is_gone_on_with(root, whole, tmp_path):
    out, journal = tmp_path / "result.json", tmp_path / "result.json.partial.jsonl"
    more = ("--metric", "mAP", "--only", *ONLY)
    with interrupted_after(15):  # in the second frame
        done = run(root, out, *more)
    assert done.status == 130
    assert f"{journal} keeps the trials: the same command with --resume goes on\ninterrupted\n" in done.err
    assert not out.exists()
    assert journal.read_bytes().count(b"\n") == 16
    journal.write_bytes(journal.read_bytes() + b'{"key": "torn by a ki')
    with mock.patch("qat.collection.observe", side_effect=AssertionError("calibrates again")):
        done = run(root, out, *more, "--resume")
    assert done.status == 0, done.err
    assert unlike(json.loads(out.read_text())) == unlike(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.csv", "result.json"]


def test_frames_side_by_side_give_what_frames_one_after_another_do(root, whole, tmp_path):
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            with mock.patch("qat.trials.share_out", wraps=parallel.share_out) as shared:
                done = run(
                    root, tmp_path / "out.json", "--stats", whole["out"].with_name("stats.npz"), "--only", BLOCK + ".*"
                )
        finally:
            torch.set_num_threads(before)
        assert done.status == 0, done.err
        assert shared.called == (threads > 1)
        found.append(unlike(json.loads((tmp_path / "out.json").read_text())))
    assert found[0] == found[1]


def test_a_quantised_model_is_measured_as_it_was_calibrated(root, whole, tmp_path):
    stats, save = whole["out"].with_name("stats.npz"), tmp_path / "ptq.pth"
    with mock.patch.object(sys, "argv", ["sensitivity.py", *arguments(root, tmp_path / "out.json", "--stats", stats)]):
        args = sensitivity.parse_args()
    prepared = quantised_model(common.load_config(args), args, torch.device("cpu"), 0)
    prepared.model.ptq = prepared.made_of
    torch.save(MMDataParallel(prepared.model), save)
    out = tmp_path / "result.csv"
    more = ("--ckpt", save, "--only", *ONLY)
    assert run(root, out, *more, "--stats", stats).err == (
        f"error: {save} is quantised already: leave out --stats, or name the float checkpoint\n"
    )
    done = run(root, out, *more, "--report", tmp_path / "report")
    assert done.status == 0, done.err
    assert [file["role"] for file in read(tmp_path / "report")["files"]] == ["int8"]
    found = {unit["name"]: unit for unit in json.loads(out.with_suffix(".json").read_text())["units"]}
    for unit in whole["units"]:
        assert found[unit["name"]]["alone"]["errors"] == unit["alone"]["errors"]
        assert found[unit["name"]]["sqnr_db"] == unit["sqnr_db"]


def without_truth(info_file: Path, target: Path) -> Path:
    """A copy of an info file as a test split has it."""
    content = pickle.loads(info_file.read_bytes())
    for info in content["infos"]:
        for key in [key for key in info if key.startswith(("gt_", "num_", "valid"))]:
            del info[key]
    target.write_bytes(pickle.dumps(content))
    return target


def test_bad_input_is_one_line(root, whole, tmp_path):
    out, stats = tmp_path / "out.json", whole["out"].with_name("stats.npz")
    bare = without_truth(root / "nuscenes_infos_val.pkl", tmp_path / "bare.pkl")
    empty = tmp_path / "empty.pkl"
    empty.write_bytes(pickle.dumps({"infos": [], "metadata": {"version": "v1.0-mini"}}))
    torch.save(MMDataParallel(build_model(load_config(CONFIG, OPTIONS)["model"])), tmp_path / "whole.pth")
    (tmp_path / "folder.json").mkdir()
    cases = {
        ("--frames", "0"): "argument --frames: expected a whole number of 1 or more, got '0'",
        ("--out", tmp_path / "out.txt"): f"--out {tmp_path}/out.txt: name a .json or .csv file; both are written",
        ("--out", tmp_path / "folder.json"): f"--out {tmp_path}/folder.json: is a folder, name a file",
        ("--only", "decoder.neck.deblock"): "--only 'decoder.neck.deblock' matched no module; nearest: 'decoder.neck.d",
        ("--metric", "mAP", "--cfg-options", f"data.val.ann_file={bare}"): f"{bare} lacks annotations of frame ",
        ("--cfg-options", f"data.val.ann_file={empty}"): f"{empty} lists no frames",
        ("--ckpt", tmp_path / "whole.pth"): f"{tmp_path}/whole.pth holds a whole float model",
        ("--stats", root / "float.pth"): f"{root}/float.pth is not a statistics file",
        ("--stats", stats, "--recipe", tmp_path / "absent.yaml"): f"--recipe {tmp_path}/absent.yaml: No such file",
    }
    for options, message in cases.items():
        done = run(root, out, *options)
        assert (done.status, done.err.count("\n")) == (2, 1), (options, done.err)
        assert message in done.err, options
    assert not out.exists()


def test_parts_apart_and_frames_without_annotations(root, whole, tmp_path):
    out, stats = tmp_path / "out.json", whole["out"].with_name("stats.npz")
    bare = without_truth(root / "nuscenes_infos_val.pkl", tmp_path / "bare.pkl")
    errors = {"both": {unit["name"]: unit["alone"]["errors"]["heatmap"] for unit in whole["units"]}}
    unannotated = ("--cfg-options", f"data.val.ann_file={bare}")
    for part, more in {"activations": unannotated, "weights": ("--stats", stats)}.items():
        done = run(root, out, "--parts", part, "--only", DEBLOCKS[0], *more)
        assert done.status == 0, done.err
        (unit,) = json.loads(out.read_text())["units"]
        errors[part] = unit["alone"]["errors"]["heatmap"]
    assert 0 < errors["weights"] < errors["both"][DEBLOCKS[0]]
    assert 0 < errors["activations"] < errors["both"][DEBLOCKS[0]]


def test_trials_of_another_run_are_refused(root, whole, tmp_path):
    out, stats = tmp_path / "out.json", whole["out"].with_name("stats.npz")
    out.with_name("out.json.partial.jsonl").write_text('{"made_of": {"split": "train"}}\n')
    done = run(root, out, "--stats", stats, "--resume", "--only", "decoder.neck.*")
    assert done.status == 2
    assert "partial.jsonl comes from another run: split was train, now it is val (and " in done.err


@pytest.mark.slow
def test_replays_of_a_camera_and_lidar_model_equal_whole_forwards(golden):
    torch.manual_seed(0)
    model = build_model(load_config(ROOT / DEFAULT_CONFIG, REDUCED).model)
    batch = golden_batch(golden)
    batch["img"] = batch["img"][..., :64, :176].contiguous()
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    fold_sparse(model)
    fold_dense(model)
    calibrate_model(model, [batch], "cpu", lambda m, one: m(**one))
    disable_layers(model, recipe.disable)
    only = ["*.layer3.0.conv1", "*.dtransform.3", "*.encoder_layer3.1.add", "fuser.0", "decoder.backbone.blocks.0.3"]
    units, found = sensitivity_units(model, only), []
    assert len(units) == len(only)
    run_trials(model, lambda: model(**batch), units, found.append, outputs=outputs_of(model))
    own = unit_quantizers(model, units)
    on = [quantizer for quantizer in named_quantizers(model).values() if not quantizer._disabled]
    fused = {}
    hook = model.fuser.register_forward_hook(lambda _, __, output: fused.update(now=output.clone()))
    for outcome in found:
        kind, unit = outcome.trial.kind, outcome.trial.unit
        with (
            torch.no_grad(),
            quantizer_flags(named_quantizers(model).values(), _disabled=True),
            quantizer_flags(on if kind in ("int8", "without") else (), _disabled=False),
            quantizer_flags(own.get(unit, ()), _disabled=kind != "alone"),
        ):
            wanted = model(**batch)
        fused.setdefault("float", fused["now"])
        assert outcome.noise["fused"] == noise_between(fused["float"], fused["now"]), outcome.trial
        assert torch.equal(outcome.result[0]["boxes_3d"].tensor, wanted[0]["boxes_3d"].tensor), outcome.trial
        assert torch.equal(outcome.result[0]["scores_3d"], wanted[0]["scores_3d"]), outcome.trial
    hook.remove()
