"""Mutated checkpoints and saved models: read right, or refused in one line.

`python -m tests.fuzz_files --count 1000` tries many; `tests/qat/test_fuzz_files.py` some.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from bevfusion.checkpoint import load_checkpoint
from bevfusion.config import load_config
from bevfusion.models import build_model
from lean.artifact import Artifact
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights
from lean.checked_file import pack, unpack
from lean.errors import QuantizationError
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.structure import stored_tensors
from lean.switches import disable_layers, named_quantizers
from qat.inference import holds_whole_model, load_model
from qat.saving import in_parallel
from tests.conftest import ROOT
from tests.fuzzing import Verdict, damage, judge, main

CONFIG = ROOT / "configs/demo/camera+lidar/resnet50.yaml"
CHECKPOINT = ROOT / "model/demo/bevfusion-demo.pth"
CPU = torch.device("cpu")
ODD = (None, True, -1, 0, 3, 10**9, 0.5, "", "x", "encoders", [], {}, ["x"], {"x": 1})


class Subjects:
    """The demo model as a float checkpoint and as both files of a quantised model, without calibration data."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads(json.dumps(load_config(CONFIG)["model"]))
        self.float = build_model(self.config)
        load_checkpoint(self.float, CHECKPOINT)
        self.state = {name: tensor.clone() for name, tensor in self.float.state_dict().items()}
        self.target = copy.deepcopy(self.float)
        quantised = quantise(copy.deepcopy(self.float))
        quantised.ptq = {"config": {"model": self.config}, "calibration": {"tokens": ["a"]}}
        self.safe = folder / "original.safetensors"
        self.safe.write_bytes(Artifact.of(quantised, quantised.ptq).to_bytes())
        self.tensors = {name: tensor.detach().clone() for name, tensor in stored_tensors(quantised).items()}
        torch.save(in_parallel(quantised), folder / "original.pth")
        torch.save({"state_dict": self.state}, folder / "legacy.pth", _use_new_zipfile_serialization=False)

    def build(self, config: dict) -> nn.Module:
        """The float model; a copy where the config is as it was, which takes less time."""
        return copy.deepcopy(self.float) if config == self.config else build_model(config)


def quantise(model: nn.Module) -> nn.Module:
    """Quantise with amax out of the air: it is not run."""
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    fold_sparse(model)
    fold_dense(model)
    for number, quantizer in enumerate(named_quantizers(model).values()):
        quantizer.set_amax(torch.tensor(1.0 + number))
    calibrate_weights(model)
    disable_layers(model, recipe.disable)
    return model


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether the tensors have the same names and values."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def load_float(subjects: Subjects, path: Path, expected: dict[str, Tensor] | None) -> bool:
    """Load a checkpoint into a model with the original weights; a refusal has to leave it as it was."""
    subjects.target.load_state_dict(subjects.state, strict=False)
    try:
        if holds_whole_model(path):
            raise AssertionError("taken for a quantised model")
        load_checkpoint(subjects.target, path)
    except Exception:
        if not equal(dict(subjects.target.state_dict()), subjects.state):
            raise AssertionError("a refused checkpoint has changed the model") from None
        raise
    return expected is not None and equal(dict(subjects.target.state_dict()), expected)


def damaged_checkpoint(subjects: Subjects, seed: int) -> tuple[str, Verdict]:
    """Bytes of a float checkpoint."""
    path = subjects.folder / "mutated.pth"
    what, data = damage(CHECKPOINT.read_bytes(), Random(seed))
    path.write_bytes(data)
    return what, judge(lambda: load_float(subjects, path, subjects.state), path)


def damaged_old_checkpoint(subjects: Subjects, seed: int) -> tuple[str, Verdict]:
    """Bytes of a checkpoint in torch's older format, which has no checksums: a changed weight can't be found."""
    path = subjects.folder / "mutated.pth"
    what, data = damage((subjects.folder / "legacy.pth").read_bytes(), Random(seed))
    path.write_bytes(data)
    verdict = judge(lambda: load_float(subjects, path, subjects.state), path)
    return what, Verdict("correct") if verdict.kind == "wrong result" else verdict


def edited_checkpoint(subjects: Subjects, seed: int) -> tuple[str, Verdict]:
    """Keys, shapes, types and wrappings of a float checkpoint."""
    path, draw = subjects.folder / "mutated.pth", Random(seed)
    what, content, expected = draw.choice(EDITS)(dict(subjects.state), draw)
    torch.save(content, path)
    return what, judge(lambda: load_float(subjects, path, expected), path)


def _without_a_key(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    name = draw.choice(list(state))
    rest = {key: value for key, value in state.items() if key != name}
    return f"remove {name}", rest, state if name.endswith("num_batches_tracked") else None


def _renamed(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    name = draw.choice([name for name in state if not name.endswith("num_batches_tracked")])
    return f"rename {name}", {(key + "_" if key == name else key): value for key, value in state.items()}, None


def _reshaped(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    name = draw.choice([name for name, value in state.items() if value.numel() > 1])
    shape = draw.choice([(state[name].numel(),), (*state[name].shape, 1), (0,), (), (7, 7)])
    new = torch.zeros(shape)
    content = state | {name: new}
    return f"shape of {name} {tuple(shape)}", content, content if new.shape == state[name].shape else None


def _retyped(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    name = draw.choice([name for name, value in state.items() if value.is_floating_point()])
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float64])
    new = state[name].to(dtype)
    return f"{name} as {dtype}", state | {name: new}, state | {name: new.float()}


def _not_finite(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    name = draw.choice([name for name, value in state.items() if value.is_floating_point() and value.numel()])
    new = state[name].clone()
    new.view(-1)[draw.randrange(new.numel())] = draw.choice([float("nan"), float("inf")])
    return f"{name} not finite", state | {name: new}, None


def _no_tensor(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    name, value = draw.choice(list(state)), draw.choice(ODD)
    return f"{name} is {value!r}", state | {name: value}, None


def _wrapped(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    inner = {f"module.{key}": value for key, value in state.items()} if draw.random() < 0.5 else state
    content = draw.choice(
        [inner, {"state_dict": inner}, {"model": inner, "epoch": 3}, {"state_dict": {"model": inner}}]
    )
    return "wrapped", content, state


def _something_else(state: dict, draw: Random) -> tuple[str, Any, dict | None]:
    content = draw.choice([*ODD, {"state_dict": draw.choice(ODD)}, list(state.values())[:3], torch.ones(2)])
    return f"holds {str(content)[:40]}", content, None


EDITS = (_without_a_key, _renamed, _reshaped, _retyped, _not_finite, _no_tensor, _wrapped, _something_else)


def damaged_safe_file(subjects: Subjects, seed: int) -> tuple[str, Verdict]:
    """Bytes of a .safetensors file."""
    path = subjects.folder / "mutated.safetensors"
    what, data = damage(subjects.safe.read_bytes(), Random(seed))
    path.write_bytes(data)
    return what, judge(lambda: equal(dict(Artifact.read(path).tensors), subjects.tensors), path)


def edited_safe_file(subjects: Subjects, seed: int) -> tuple[str, Verdict]:
    """The document or the tensors of a .safetensors file, with fitting checksums: built, or refused."""
    path, draw = subjects.folder / "mutated.safetensors", Random(seed)
    tensors, document = unpack(subjects.safe)
    what = _edit_document(document, draw) if draw.random() < 0.7 else _edit_tensors(tensors, draw)
    path.write_bytes(pack(tensors, document))

    def read() -> bool:
        try:
            model = Artifact.read(path).build(subjects.build)
        except QuantizationError as error:  # lean.load puts the file's name in front
            raise QuantizationError(f"{path}: {error}") from error
        return isinstance(model, nn.Module)

    return what, judge(read, path)


def _edit_document(document: dict, draw: Random) -> str:
    """Remove or replace something outside the float model's config, which has trials of its own."""
    node, place = document, ""
    while True:
        keys = [key for key in (node if isinstance(node, dict) else range(len(node))) if key != "config"]
        if not keys:
            return "nothing"
        key = draw.choice(keys)
        place += f".{key}"
        if not isinstance(node[key], dict | list) or draw.random() < 0.2:
            break
        node = node[key]
    if draw.random() < 0.3:
        del node[key]
        return f"remove {place}"
    node[key] = copy.deepcopy(draw.choice(ODD))
    return f"{place} = {node[key]!r}"


def _edit_tensors(tensors: dict[str, Tensor], draw: Random) -> str:
    name = draw.choice(list(tensors))
    tensor = tensors.pop(name)
    edit = draw.choice(["remove", "rename", "flatten", "lengthen", "half", "int", "nan"])
    made = {
        "rename": lambda: {f"{name}_": tensor},
        "flatten": lambda: {name: tensor.flatten()},
        "lengthen": lambda: {name: torch.cat([tensor.flatten(), tensor.flatten()[:1]])},
        "half": lambda: {name: tensor.half()},
        "int": lambda: {name: tensor.int()},
        "nan": lambda: {name: torch.full_like(tensor.float(), float("nan"))},
    }
    tensors |= made.get(edit, dict)()
    return f"{edit} {name}"


def damaged_pickle(subjects: Subjects, seed: int) -> tuple[str, Verdict]:
    """Bytes of the pickle of a quantised model, which is trusted."""
    path = subjects.folder / "mutated.pth"
    what, data = damage((subjects.folder / "original.pth").read_bytes(), Random(seed))
    path.write_bytes(data)
    cfg = {"model": subjects.config}
    return what, judge(lambda: equal(stored_tensors(load_model(cfg, path, CPU)), subjects.tensors), path)


def trials(folder: Path) -> dict[str, Callable[[int], tuple[str, Verdict]]]:
    """All kinds of mutation by name, each a function of the seed alone."""
    subjects = Subjects(folder)
    kinds = (
        damaged_checkpoint,
        edited_checkpoint,
        damaged_safe_file,
        edited_safe_file,
        damaged_pickle,
        damaged_old_checkpoint,
    )
    return {kind.__name__.replace("_", " "): partial(kind, subjects) for kind in kinds}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(trials(Path(scratch)))
