"""What `qat/ptq.py` looks at before the first frame and after the last."""

import logging
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bevfusion.config import load_config
from bevfusion.data import calibration_dataset, frames_of, unreadable_frames
from lean.bevfusion_recipe import default_recipe
from lean.errors import QuantizationError
from lean.insert import insert_quantizers
from lean.outliers import outliers
from lean.sqnr import Measured, Noise
from lean.status import layer_status
from lean.switches import quantized_layers
from qat import gates, preflight
from tests.lean.tiny import TinyFusion
from tests.qat.demo_samples import CKPT, CONFIG, SMALLER, TRAINING_FRAMES, ptq, write_world
from tests.qat.ptq_samples import expect_refusal


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(root, tmp_path) -> Path:
    """A copy for a test that damages it."""
    return shutil.copytree(root, tmp_path / "world")


def test_a_run_does_what_its_plan_says_proves_folding_and_measures_noise(root, tmp_path):
    dry = ptq(root, tmp_path / "dry" / "ptq.pth", "--dry-run", "--disable", "fuser.0")
    assert dry.status == 0, dry.err
    assert list((tmp_path / "dry").iterdir()) == []
    done = ptq(root, tmp_path / "ptq.pth", "--disable", "fuser.0", frames=3)
    assert done.status == 0, done.err

    model = torch.load(tmp_path / "ptq.pth", weights_only=False).module
    layers = quantized_layers(model)
    rows = {cells[1]: cells for line in dry.out.splitlines() if len(cells := line.replace("|", " | ").split()) > 4}
    for name, layer in layers.items():
        assert rows[name][5] == ("float" if layer.is_disabled else "int8")
    shared = {name: cells[7] for name, cells in rows.items() if name in layers and cells[7] != "-"}
    assert shared["encoders.camera.backbone.layer1.0.downsample.0"] == "encoders.camera.backbone.layer1.0.conv1"
    assert all(layers[name]._input_quantizer is layers[leader]._input_quantizer for name, leader in shared.items())
    assert "heads.object.heatmap_head.0.bn into heads.object.heatmap_head.0.conv (float)" in dry.out
    assert all(token in dry.out for token in model.ptq["calibration"]["tokens"])
    for out in (dry.out, done.out):
        assert "fuser.0: --disable (fuser.0)" in out
        assert "decoder.neck.deblocks.0.0: disabled by the recipe" in out

    assert "folded 97 batch normalisations: outputs differ by" in done.out
    table = {line.split("|")[1].strip(): line.split("|")[-2] for line in done.out.splitlines() if "|" in line}
    for name in ("encoders.camera", "encoders.lidar.backbone", "fuser", "decoder", "heads.object.heatmap_head"):
        assert 15 < float(table[name]) < 60, name
    assert "encoders.camera: ranges more than a factor of 1000 from" in done.err


def test_kept_statistics_are_used_without_a_frame_and_it_is_said(root, tmp_path):
    assert ptq(root, tmp_path / "ptq.pth", "--no-checks", "--stats", tmp_path / "s.npz", frames=1).status == 0
    done = ptq("/nonexistent", tmp_path / "ptq.pth", "--from-stats", tmp_path / "s.npz", "--save", tmp_path / "b.pth")
    expect = "folded 97 batch normalisations; not compared with the network before, as no frame was run"
    assert expect in done.out, done.err
    dry = ptq("/nonexistent", tmp_path / "ptq.pth", "--from-stats", tmp_path / "s.npz", "--dry-run")
    assert "frames: none, ranges come from kept statistics" in dry.out, dry.err


def spoil(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "content", "words"),
    [
        ("samples/CAM_BACK/*0061_1.jpg", None, "does not exist"),
        ("samples/CAM_BACK/*0061_1.jpg", b"", "can't be opened"),
        ("samples/CAM_BACK/*0061_1.jpg", b"\x89PNG and no more", "can't be opened"),
        ("samples/LIDAR_TOP/*0061_3.pcd.bin", b"", "is empty"),
        ("samples/LIDAR_TOP/*0061_3.pcd.bin", b"123", "is cut off"),
        ("sweeps/LIDAR_TOP/*0061_2.pcd.bin", b"x" * 21, "is cut off"),
        ("sweeps/LIDAR_TOP/*0061_2.pcd.bin", None, "does not exist"),
    ],
)
def test_damaged_files_of_chosen_frames_are_found_before_the_first_runs(world, tmp_path, pattern, content, words):
    (file,) = world.glob(pattern)
    spoil(file, content)
    done = ptq(world, tmp_path / "ptq.pth", "--dry-run", frames=TRAINING_FRAMES)
    expect_refusal(done, file.name, "frame ", words)


def test_all_bad_frames_are_counted_and_none_that_was_not_chosen(world, tmp_path):
    for file in world.glob("samples/CAM_BACK/*0061_*.jpg"):
        spoil(file, b"")
    expect_refusal(ptq(world, tmp_path / "ptq.pth", "--dry-run", frames=TRAINING_FRAMES), "3 of 9 frames can't be")
    skipped = ptq(world, tmp_path / "ptq.pth", "--dry-run", "--on-bad-frame", "skip", frames=TRAINING_FRAMES)
    assert skipped.status == 0
    assert "3 of 9 frames can't be opened and will be replaced" in skipped.err
    cfg = load_config(CONFIG, [f"dataset_root={world}/", *SMALLER])
    dataset = frames_of(calibration_dataset(cfg, "test"))
    assert set(unreadable_frames(dataset, [0, 5, 8])) == {0}


def test_bad_weights_are_named(root, tmp_path):
    state = torch.load(CKPT)
    state["state_dict"]["fuser.0.weight"][0, 0, 0, 0] = np.nan
    state["state_dict"]["decoder.backbone.blocks.0.0.weight"][0] = np.inf
    torch.save(state, tmp_path / "a.pth")
    words = ("fuser.0.weight", "decoder.backbone.blocks.0.0.weight", "hold NaN or infinity")
    expect_refusal(ptq(root, tmp_path / "ptq.pth", "--dry-run", "--ckpt", tmp_path / "a.pth"), *words)
    state = torch.load(CKPT)
    state["state_dict"]["fuser.1.running_var"][0] = -1
    torch.save(state, tmp_path / "b.pth")
    done = ptq(root, tmp_path / "ptq.pth", "--dry-run", "--ckpt", tmp_path / "b.pth")
    expect_refusal(done, "fuser.1.running_var", "variance is negative")


def test_a_full_disk_and_a_limit_on_files_are_found_at_the_start(tmp_path, monkeypatch):
    save = tmp_path / "ptq.pth"
    preflight.check_space(save, 10 * 2**20, 0)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=30 * 2**20))
    with pytest.raises(QuantizationError, match="about 36 MiB are needed, but 30 MiB are free"):
        preflight.check_space(save, 10 * 2**20, 0)
    monkeypatch.undo()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, before[1]))
    try:
        with pytest.raises(QuantizationError, match="files may have 5 MiB here"):
            preflight.check_space(save, 10 * 2**20, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What is logged as a warning."""
    found: list[str] = []
    monkeypatch.setattr(logging.getLogger("qat"), "warning", lambda text, *values: found.append(text % values))
    return found


def test_a_gpu_without_room(warnings):
    preflight.check_gpu(8000 * 2**20, 80000 * 2**20, 100 * 2**20)
    assert warnings == []
    preflight.check_gpu(2000 * 2**20, 80000 * 2**20, 100 * 2**20)
    assert "2000 of 80000 MiB of the GPU are free" in warnings[0]
    with pytest.raises(QuantizationError, match="400 of 80000 MiB of the GPU are free"):
        preflight.check_gpu(400 * 2**20, 80000 * 2**20, 100 * 2**20)


@pytest.fixture
def fusion():
    """A small model whose ranges are all 1."""
    model = TinyFusion()
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    for layer in quantized_layers(model).values():
        for quantizer in layer.quantizers:
            quantizer.set_amax(torch.ones(()))
    return model, recipe


def test_ranges_far_from_those_of_their_branch_are_outliers(fusion):
    model, recipe = fusion
    branches = [branch.path for branch in recipe.branches]
    assert outliers(model, branches) == []
    layer = model.decoder.backbone.blocks[1][0]
    layer._input_quantizer.set_amax(torch.tensor(1001.0))
    layer._weight_quantizer.set_amax(torch.tensor([1e-3, 0.999e-3]))
    assert [(found.layer, found.what) for found in outliers(model, branches)] == [
        ("decoder.backbone.blocks.1.0", "input")
    ]
    layer._weight_quantizer.set_amax(torch.tensor([0.999e-3]))
    assert [found.what for found in outliers(model, branches)] == ["input", "weight"]
    assert len([s for s in layer_status(model) if s.input_amax == 1001]) == 1


def test_a_noisy_branch_is_a_warning_that_names_its_worst_layers(warnings):
    layers = {f"decoder.{i}": Noise(100, 10.0**i) for i in range(4)} | {"fuser.0": Noise(1, 100)}
    measured = Measured({"both": layers}, {"decoder.neck": Noise(100, 20), "fuser": Noise(100, 5)}, 1)
    gates._warn_of_noise("decoder", measured, "decoder.neck")
    gates._warn_of_noise("fuser", measured, "fuser")
    (warning,) = warnings
    assert "decoder: SQNR of its output is 7.0 dB, below 10" in warning
    assert "decoder.3 (-10.0 dB), decoder.2 (0.0 dB), decoder.1 (10.0 dB)" in warning
