"""`qat/export-scn.py` with the options that users' shell scripts pass."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmcv.parallel import MMDataParallel

from bevfusion.config import load_config
from lean.export.scn_graph import load_graph
from lean.switches import named_quantizers
from qat.arguments import DEFAULT_CONFIG
from tests.conftest import ROOT
from tests.lean.export.samples import prepare, reduced_model
from tests.qat.ptq_samples import REDUCED, Outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A quantised model with its amax set by hand, and the float checkpoint that it was made of."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = reduced_model()
    torch.save({"state_dict": model.state_dict()}, folder / "float.pth")
    model = prepare(model)
    for quantizer in named_quantizers(model).values():
        if quantizer.axis is None:
            quantizer.set_amax(torch.tensor(8.0))
    model.ptq = {"config": dict(load_config(ROOT / DEFAULT_CONFIG, list(REDUCED)))}
    torch.save(MMDataParallel(model, device_ids=[]), folder / "ptq.pth")
    torch.save({"state_dict": model.state_dict()}, folder / "state.pth")
    return folder


def export(*arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["export-scn.py", *map(str, arguments)]),
        mock.patch.object(sys, "path", [*sys.path]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        runpy.run_path(str(ROOT / "qat" / "export-scn.py"), run_name="__main__")
    return Outcome(stopped.value.code or 0, out.getvalue(), err.getvalue())


def test_both_orders_and_precisions(folder, tmp_path):
    save = tmp_path / "new" / "lidar.backbone.onnx"
    runs = [
        export("--ckpt", folder / "ptq.pth", "--save", save, "--in-channel", 5),
        export("--ckpt", folder / "ptq.pth", "--save", save, "--inverse"),
        export("--ckpt", folder / "ptq.pth", "--save", tmp_path / "half.onnx", "--fp16"),
    ]
    assert [run.status for run in runs] == [0, 0, 0], [run.err for run in runs]
    files = [save.with_suffix(".xyz.onnx"), save.with_suffix(".zyx.onnx"), tmp_path / "half.xyz.onnx"]
    first = [load_graph(file).nodes[1] for file in files]
    assert [node["input_spatial_shape"] for node in first] == [[384, 384, 41], [41, 384, 384], [384, 384, 41]]
    assert [node["precision"] for node in first] == ["int8", "int8", "fp16"]
    assert str(files[0]) in runs[0].out


def test_a_float_checkpoint_as_fp16(folder, tmp_path):
    arguments = ["--config", ROOT / DEFAULT_CONFIG, "--cfg-options", *REDUCED]
    done = export("--ckpt", folder / "float.pth", "--save", tmp_path / "a.onnx", "--fp16", *arguments)
    assert done.status == 0, done.err
    assert {n.attributes.get("precision", "fp16") for n in load_graph(tmp_path / "a.xyz.onnx").nodes} == {"fp16"}


@pytest.mark.parametrize(
    ("file", "more", "words"),
    [
        ("float.pth", [], ["float checkpoint", "qat/ptq.py", "--fp16"]),
        ("state.pth", [], ["state dict"]),
        ("none.pth", [], ["none.pth"]),
        ("ptq.pth", ["--in-channel", 4], ["--in-channel 4", "5 features"]),
        ("ptq.pth", ["--save", "/proc/nowhere/a.onnx"], ["--save", "/proc/nowhere"]),
        ("ptq.pth", ["--in-channel", "five"], ["--in-channel"]),
    ],
    ids=lambda value: str(value),
)
def test_bad_input(folder, tmp_path, file, more, words):
    done = export("--ckpt", folder / file, "--save", tmp_path / "a.onnx", *more)
    assert done.status == 2
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.err
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.iterdir())
