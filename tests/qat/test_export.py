"""`qat/export.py` and its doors, from a saved model to the files, and what they say of input they can't use."""

import shutil
from pathlib import Path
from unittest import mock

import onnx
import pytest
import torch
from mmcv.parallel import MMDataParallel

from bevfusion.config import load_config
from lean.errors import QuantizationError
from lean.export.folder import all_or_none
from qat import arguments
from qat.exporting import first_difference
from tests.conftest import ROOT
from tests.lean.export.samples import reduced_model, reduced_ptq
from tests.qat.ptq_samples import REDUCED, expect_refusal
from tests.qat.scripts import run_script

DENSE = ["camera.backbone.onnx", "camera.vtransform.onnx", "fuser.onnx", "head.bbox.onnx"]
FILES = sorted([*DENSE, "lidar.backbone.xyz.onnx"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden) -> Path:
    """A folder with the small model, quantised, as a whole model and as a state dict, and its float checkpoint."""
    path = tmp_path_factory.mktemp("models")
    model = reduced_ptq(golden)
    torch.save({"state_dict": model.state_dict()}, path / "state.pth")
    model.ptq = {"config": {"model": load_config(ROOT / arguments.DEFAULT_CONFIG, list(REDUCED)).model}}
    torch.save(MMDataParallel(model, device_ids=[]), path / "ptq.pth")
    torch.save({"state_dict": reduced_model().state_dict()}, path / "float.pth")
    return path


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_all_files_are_written_and_reported(folder, tmp_path):
    done = run_script("export.py", "--ckpt", folder / "ptq.pth", "--out", tmp_path, "--inverse")
    assert done.status == 0, done.err
    assert names(tmp_path) == sorted([*FILES, "lidar.backbone.zyx.onnx"])
    assert "fuser.onnx: /neck/deblocks.0/deblocks.0.0/Conv (Conv): its input" in done.out
    assert "float32 in /Sigmoid" in done.out
    for name in DENSE:
        onnx.checker.check_model(str(tmp_path / name))
    assert any(n.op_type == "QuantizeLinear" for n in onnx.load(tmp_path / "fuser.onnx").graph.node)


def test_fp16_works_with_a_float_checkpoint(folder, tmp_path):
    done = run_script(
        "export.py", "--ckpt", folder / "float.pth", "--fp16", "--typing", "weak", "--out", tmp_path,
        *("--layernorm-plugin", "--cfg-options", *REDUCED),
    )  # fmt: skip
    assert done.status == 0, done.err
    assert names(tmp_path) == FILES
    for name in DENSE:
        graph = onnx.load(tmp_path / name).graph
        operators = {node.op_type for node in graph.node}
        assert not operators & {"QuantizeLinear", "DequantizeLinear"}
        assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert ("CustomLayerNormalization" in operators) == (name == "head.bbox.onnx")
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "fuser.onnx").graph.node}


@pytest.mark.parametrize(("script", "files"), [("export-camera.py", DENSE[:2]), ("export-transfuser.py", DENSE[2:])])
def test_doors_write_their_part(folder, tmp_path, script, files):
    done = run_script(script, "--ckpt", folder / "ptq.pth", "--fp16", "--save", tmp_path / "a" / "b")
    assert done.status == 0, done.err
    assert names(tmp_path / "a" / "b") == files


def test_a_float_checkpoint_is_not_taken_for_a_quantised_model(folder, tmp_path):
    done = run_script("export.py", "--ckpt", folder / "float.pth", "--out", tmp_path / "new")
    expect_refusal(done, "float.pth", "not quantised", "qat/ptq.py", "--fp16")
    assert not (tmp_path / "new").exists()


def test_a_state_dict_is_not_taken_for_a_model(folder, tmp_path):
    done = run_script("export.py", "--ckpt", folder / "state.pth", "--out", tmp_path)
    expect_refusal(done, "state.pth", "state dict", "whole model")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda layer: layer._input_quantizer._amax.fill_(float("nan")), ["amax", "fuser.0._input_quantizer"]),
        (lambda layer: delattr(layer._weight_quantizer, "_amax"), ["amax", "fuser.0._weight_quantizer"]),
        (lambda layer: layer.weight.data[0].fill_(float("inf")), ["fuser.0.weight", "infinity"]),
        (lambda layer: layer.bias.data[0].fill_(1e6), ["fuser.onnx", "fuser.0.bias", "65504"]),
    ],
)
def test_a_damaged_model_is_refused_and_the_files_stay_as_they_were(golden, tmp_path, damage, words):
    model = reduced_ptq(golden)
    damage(model.fuser[0])
    torch.save(MMDataParallel(model, device_ids=[]), tmp_path / "ptq.pth")
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).write_text(name)
    expect_refusal(run_script("export.py", "--ckpt", tmp_path / "ptq.pth", "--out", out), *words)
    assert {name: (out / name).read_text() for name in names(out)} == {name: name for name in FILES}


def test_a_config_that_does_not_fit(folder, tmp_path):
    options = [*REDUCED, "model.heads.object.num_proposals=30"]
    done = run_script("export.py", "--ckpt", folder / "ptq.pth", "--out", tmp_path, "--cfg-options", *options)
    expect_refusal(done, "ptq.pth", "model.heads.object.num_proposals")
    done = run_script("export.py", "--ckpt", folder / "float.pth", "--out", tmp_path, "--fp16")
    expect_refusal(done, "float.pth")
    assert names(tmp_path) == []


def test_the_config_of_the_model_is_welcome(folder, tmp_path):
    done = run_script("export-camera.py", "--ckpt", folder / "ptq.pth", "--out", tmp_path, "--cfg-options", *REDUCED)
    assert done.status == 0, done.err


def test_a_folder_that_can_not_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_script("export.py", "--ckpt", folder / "ptq.pth", "--out", tmp_path / "file")
    expect_refusal(done, str(tmp_path / "file"), "can't write")
    expect_refusal(run_script("export.py", "--ckpt", tmp_path / "none.pth", "--out", tmp_path), "none.pth")


def test_configs_are_compared_key_by_key():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": (1, {"b": 2})}, "model") is None
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, "model") == "model.a.c"
    assert first_difference({"a": 1}, {"a": 1, "d": 0}, "model") == "model.d"


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyError), all_or_none(tmp_path) as staging:
        (staging / "a").write_text("new")
        raise KeyError
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_text() == "old"
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    (tmp_path / "c").mkdir()  # a folder in the place of a file: it moves aside, and back if a later file fails
    (tmp_path / "c" / "kept").write_text("")
    with all_or_none(tmp_path) as staging:
        for name in ("a", "b"):
            (staging / name).write_text("new")
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["new", "new"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_a_failing_replacement_is_undone(tmp_path):
    import os

    (tmp_path / "a").write_text("old")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if Path(target) == tmp_path / "b":
            raise OSError(28, "No space left on device")
        real(source, target)

    with (
        mock.patch("lean.export.folder.os.replace", replace),
        pytest.raises(QuantizationError, match="No space left"),
        all_or_none(tmp_path) as staging,
    ):
        for name in ("a", "b"):
            (staging / name).write_text("new")
    assert calls
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"
