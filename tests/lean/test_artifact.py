"""The .safetensors file of a quantised model: what is loaded is what was saved, and damage is named."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lean
from lean import funcs
from lean.artifact import Artifact
from lean.checked_file import holds_checked, pack, unpack
from lean.errors import QuantizationError
from lean.sharing import sharing_groups
from lean.structure import describe, stored_tensors
from lean.switches import named_quantizers
from tests.conftest import ROOT
from tests.lean.test_saved import quantised
from tests.lean.tiny import TinyFusion, batch, run

MADE_OF = {"config": {"model": {"type": "TinyFusion"}}, "calibration": {"tokens": ["a", "b"]}, "percentile": 99.99}


def build(config: dict) -> torch.nn.Module:
    assert config == MADE_OF["config"]["model"]
    return TinyFusion()


@pytest.fixture(scope="module")
def model() -> TinyFusion:
    """A quantised model in which nothing is as it is by default."""
    made = quantised()
    funcs.fuse_relu_only(made.encoders["lidar"]["backbone"])
    narrow = made.fuser[0]._input_quantizer
    narrow._num_bits, narrow._narrow_range = 6, True
    return made


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    path.write_bytes(Artifact.of(model, MADE_OF).to_bytes())
    return path


def test_the_loaded_model_computes_what_the_saved_one_computed(model, saved):
    loaded = lean.load(saved, build=build)
    assert torch.equal(run(loaded, batch(7)), run(model, batch(7)))
    assert not loaded.training
    assert loaded.ptq == MADE_OF


def test_the_loaded_model_is_built_like_the_saved_one(model, saved):
    loaded = lean.load(saved, build=build)
    assert sharing_groups(loaded) == sharing_groups(model)
    assert describe(loaded) == describe(model)
    kinds = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    assert {name: type(module) for name, module in loaded.named_modules(remove_duplicate=False)} == kinds
    expected = stored_tensors(model)
    assert stored_tensors(loaded).keys() == expected.keys()
    for name, tensor in stored_tensors(loaded).items():
        assert torch.equal(tensor, expected[name]), name
        assert type(tensor) is type(expected[name]), name
    theirs = named_quantizers(model)
    for name, quantizer in named_quantizers(loaded).items():
        attributes = ("_num_bits", "_axis", "_unsigned", "_narrow_range", "_disabled", "_if_quant", "_if_calib")
        for attribute in (*attributes, "_fake_quant", "_learn_amax"):
            assert getattr(quantizer, attribute) == getattr(theirs[name], attribute), (name, attribute)
        assert type(quantizer._calibrator) is type(theirs[name]._calibrator)


def test_it_can_be_saved_again_to_the_same_bytes(saved):
    loaded = lean.load(saved, build=build)
    assert Artifact.of(loaded, loaded.ptq).to_bytes() == saved.read_bytes()


SAVE = """
import sys
from pathlib import Path
import torch
from lean.artifact import Artifact
from tests.lean.test_artifact import MADE_OF
from tests.lean.test_saved import quantised
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
Path(sys.argv[1]).write_bytes(Artifact.of(quantised(), MADE_OF).to_bytes())
"""


def test_equal_runs_give_equal_bytes(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SAVE, tmp_path / "a", str(torch.get_num_threads())]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"})
    torch.manual_seed(0)
    assert (tmp_path / "a").read_bytes() == Artifact.of(quantised(), MADE_OF).to_bytes()


def test_mappings_keep_their_order(tmp_path):
    """A config's order is that of the parts that are built by it, and of their outputs."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack({}, {"rot": 1, "dim": {"z": 2, "a": 3}}))
    document = unpack(file)[1]
    assert list(document) == ["rot", "dim"]
    assert list(document["dim"]) == ["z", "a"]


def test_loading_leaves_the_random_state_alone(saved):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lean.load(saved, build=build)
    assert torch.equal(torch.get_rng_state(), before)


def test_importing_lean_costs_nothing():
    code = "import sys, lean; assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_other_files_are_told_apart(saved, tmp_path):
    assert holds_checked(saved)
    torch.save({}, tmp_path / "a.pth")
    assert not holds_checked(tmp_path / "a.pth")
    (tmp_path / "renamed").write_bytes(saved.read_bytes())
    assert holds_checked(tmp_path / "renamed")


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(data: bytes, position: int, bit: int = 0) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:5], "truncated"),
        (lambda data: data[:100], "truncated within its metadata"),
        (lambda data: data[:-1], r"truncated \(\d+ of \d+ bytes\)"),
        (lambda data: b"", "truncated"),
        (lambda data: flip(data, data.index(b"percentile")), "damaged: its metadata"),
        (lambda data: data.replace(b"99.99", b"99.98"), "damaged: its metadata"),
        (lambda data: flip(data, len(data) - 1), r"damaged: tensor '[\w.]+' does not fit its checksum"),
        (lambda data: data + b"x", "damaged"),
    ],
)
def test_damage_is_named(saved, tmp_path, damage, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(QuantizationError, match=f"{path} .*{words}"):
        lean.load(path, build=build)


def test_a_flipped_bit_names_its_tensor(saved, tmp_path):
    data = saved.read_bytes()
    header = json.loads(data[8 : header_end(data)])
    name, (begin, end) = "decoder.backbone.blocks.0.0.weight", (0, 0)
    begin, end = header[name]["data_offsets"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(flip(data, header_end(data) + (begin + end) // 2, 7))
    with pytest.raises(QuantizationError, match=f"tensor '{name}' does not fit"):
        lean.load(path, build=build)


def test_every_flipped_bit_is_found(saved, tmp_path):
    """Any single bit: of the length, the list of tensors, the metadata, the padding, the values."""
    data, path, draw = saved.read_bytes(), tmp_path / "model.safetensors", random.Random(0)
    end = header_end(data)
    positions = [
        *range(8),
        *(draw.randrange(8, end) for _ in range(100)),
        *(draw.randrange(len(data)) for _ in range(60)),
    ]
    for position in positions:
        path.write_bytes(flip(data, position, draw.randrange(8)))
        with pytest.raises(QuantizationError) as error:
            Artifact.read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_what_does_not_fit_the_model_is_named(model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(Artifact.of(model, MADE_OF).to_bytes())

    def narrower(_):
        other = TinyFusion()
        other.fuser[0] = torch.nn.Conv2d(56, 4, 3, padding=1, bias=False)
        return other

    with pytest.raises(
        QuantizationError, match=r"model.safetensors: tensor fuser.0.weight was saved as float32 \(8, 56"
    ):
        lean.load(path, build=narrower)
    with pytest.raises(QuantizationError, match=r"encoders.camera.backbone.conv1 was saved, but the model"):
        lean.load(path, build=lambda _: torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("leaf", "dtype"), [("bias", torch.int32), ("bias", torch.float16), ("_input_quantizer._amax", torch.int32)]
)
def test_a_type_that_a_layer_can_not_compute_with_is_named(model, leaf, dtype):
    artifact, name = Artifact.of(model, MADE_OF), f"encoders.camera.backbone.conv1.{leaf}"
    edited = dataclasses.replace(artifact, tensors={**artifact.tensors, name: artifact.tensors[name].to(dtype)})
    with pytest.raises(QuantizationError, match=f"tensor {name} was saved as {dtype}, which its layer can't"):
        edited.build(build)


def test_what_can_not_be_saved_is_named(model):
    with pytest.raises(QuantizationError, match=r"config.classes has the key 1"):
        Artifact.of(model, {"config": {"classes": {1: "car"}}})
    with pytest.raises(QuantizationError, match=r"config.path is a PosixPath"):
        Artifact.of(model, {"config": {"path": Path("a")}})


def test_files_of_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(QuantizationError, match="safetensors file of something else"):
        lean.load(path)
    with pytest.raises(QuantizationError, match="file not found"):
        lean.load(tmp_path / "absent.safetensors")
