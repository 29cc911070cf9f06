"""`qat/inspect.py`: what a quantised model's file is, and in what two of them differ."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from lean import quantize
from lean.artifact import Artifact
from qat import common, inspect
from tests.conftest import ROOT
from tests.lean.test_saved import quantised
from tests.qat.ptq_samples import Outcome

LAYER = "encoders.camera.neck.fpn_convs.0.conv"


def made_of(*tokens: str, **more: object) -> dict:
    return {
        "config": {"model": {"type": "Tiny"}},
        "checkpoint": {"file": "float.pth", "sha256": "abc"},
        "calibration": {"tokens": list(tokens), "sha256": "x".join(tokens), "pipeline": "test", "seed": 0},
        "method": {"*": "mse"},
        "versions": {"torch": "2.14"},
        **more,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Two files of one model: the second has one more layer in float, another amax, weight, method and frame."""
    torch.manual_seed(0)
    model, folder = quantised(), tmp_path_factory.mktemp("files")
    (folder / "a.safetensors").write_bytes(Artifact.of(model, made_of("t1", "t2")).to_bytes())
    quantize.disable_layers(model, ["fuser.0"])
    quantizer = model.get_submodule(LAYER)._input_quantizer
    quantizer.set_amax(quantizer.amax / 4)
    with torch.no_grad():
        model.head[0].weight *= 1.5
    other = made_of("t1", "t3", method={"*": "entropy"})
    (folder / "b.safetensors").write_bytes(Artifact.of(model, other).to_bytes())
    torch.save(torch.nn.DataParallel(model), folder / "c.pth")
    return folder / "a.safetensors", folder / "b.safetensors"


def run(*arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["inspect.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        common.run(inspect.main)
    return Outcome(stopped.value.code or 0, out.getvalue(), err.getvalue())


def cells(text: str, first: str) -> list[str]:
    """The row of a table whose first cell is `first`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return next(row for row in rows if row[0] == first)


def test_a_file_is_described(files):
    done = run(files[1])
    assert done.status == 0, done.err
    assert "fuser.0, decoder.neck.deblocks.0.0" in cells(done.out, "layers")[1]
    assert cells(done.out, "frames")[1].startswith("2, pipeline test, seed 0")
    assert cells(done.out, "fuser.0")[1:4] == ["QuantConv2d", "float", "8/8"]
    assert cells(done.out, LAYER)[2] == "int"
    block = "encoders.camera.backbone.layer1.1"
    assert cells(done.out, f"{block}.conv1")[-1] == f"{block}.add"


def test_everything_but_the_weights_as_json(files):
    found = json.loads(run(files[0], "--json").out)
    assert found["made_of"] == made_of("t1", "t2")
    assert found["layers"]["fuser.0"]["weight axis"] == 0
    amax = Artifact.read(files[0]).tensors["fuser.0._weight_quantizer._amax"]
    assert found["amax"]["fuser.0._weight_quantizer"] == amax.flatten().tolist()
    assert found["tensors"]["head.0.weight"] == ["torch.float32", [4, 16, 1]]


def test_differences_are_listed_and_nothing_else(files):
    found = json.loads(run(files[0], "--diff", files[1], "--json").out)
    assert found["made_of"] == [["method.*", "mse", "entropy"]]
    assert found["frames"] == {"first": 2, "second": 2, "common": 1, "same": False}
    assert found["layers"] == [["fuser.0", "state", "int", "float"]]
    (name, *_, ratio) = found["amax"]["changed"][0]
    assert (len(found["amax"]["changed"]), name, ratio) == (1, f"{LAYER}._input_quantizer", 0.25)
    assert found["tensors"]["changed"] == [["head.0.weight", pytest.approx(0.5)]]
    assert found["tensors"]["only_first"] == found["tensors"]["only_second"] == []

    text = run(files[0], "--diff", files[1]).out
    assert cells(text, f"{LAYER}._input_quantizer")[-1] == "0.25"
    assert cells(text, "fuser.0") == ["fuser.0", "state", "int", "float"]
    assert "frames: 2 and 2, 1 in common" in text


def test_nothing_differs_from_itself(files):
    assert run(files[0], "--diff", files[0]).out == "nothing differs\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.safetensors"], "file not found: absent.safetensors"),
        (["c.pth"], "name the .safetensors file beside it, or pass --trust-pickle"),
        (["c.pth", "--trust-pickle"], "holds no model that qat/ptq.py has saved"),
        (["a.safetensors", "--diff", "cut.safetensors"], "cut.safetensors is truncated"),
    ],
)
def test_what_can_not_be_inspected(files, arguments, words, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    Path("cut.safetensors").write_bytes(files[0].read_bytes()[:-7])
    done = run(*arguments)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert words in done.err


def test_it_does_not_hide_the_standard_librarys_inspect():
    command = [sys.executable, "qat/inspect.py", "--help"]
    assert "--diff OTHER" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
