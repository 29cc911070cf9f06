"""`qat/ptq.py` from a float checkpoint to a quantised model, and what it says of input it can't use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lean.switches import named_quantizers, quantized_layers
from qat.arguments import DEFAULT_CONFIG
from tests.conftest import ROOT
from tests.golden_model import golden_batch, golden_model, golden_state_dict
from tests.lean.golden_names import our_quantizer
from tests.qat.ptq_samples import Outcome, edit_infos, expect_refusal, link_frame, options, run_here, with_reduced_model


@pytest.fixture(scope="module")
def root(tmp_path_factory, realframe, golden) -> Path:
    """A data root of four copies of the real keyframe, with the reduced model's checkpoint."""
    folder = link_frame(tmp_path_factory.mktemp("data") / "nuscenes", realframe, golden, frames=4)
    return with_reduced_model(folder)


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """A data root of its own for a test that damages it."""
    return shutil.copytree(root, tmp_path / "nuscenes", symlinks=True)


def ptq(root: Path, save: Path, *more: object, frames: int = 1) -> Outcome:
    """Run it, without the checks that cost three forwards: they have tests of their own."""
    common = ["--ckpt", root / "float.pth", "--dataset-root", root, "--device", "cpu", "--workers", 0]
    common += ["--calib-pipeline", "test", "--calibrate_batch", frames, "--save", save, "--no-checks"]
    return run_here("--config", ROOT / DEFAULT_CONFIG, *common, "--cfg-options", *options(root), *more)


def load(path: Path) -> torch.nn.Module:
    return torch.load(path, weights_only=False).module


def test_a_run_says_what_it_did_and_saves_a_calibrated_model(root, tmp_path):
    done = ptq(root, tmp_path / "ptq.pth", "--disable", "fuser.0", frames=2)
    assert done.status == 0, done.err
    assert "training frames: 4" in done.out
    assert "validation frames: 4" in done.out
    assert "calibrate" in done.out
    model = load(tmp_path / "ptq.pth")
    layers = quantized_layers(model)
    off = {name for name, layer in layers.items() if layer.is_disabled}
    assert off == {"encoders.lidar.backbone.conv_input.0", "decoder.neck.deblocks.0.0", "fuser.0"}
    assert all(torch.isfinite(q.amax).all() and (q.amax > 0).all() for q in named_quantizers(model).values())
    assert len(model.ptq["calibration"]["tokens"]) == 2
    assert model.ptq["method"] == {"*": "mse"}


def test_a_run_can_be_repeated_from_its_recipe(root, tmp_path):
    first = ptq(root, tmp_path / "a.pth", "--disable", "fuser.0", "--save-recipe", tmp_path / "a.yaml")
    assert first.status == 0, first.err
    second = ptq(root, tmp_path / "b.pth", "--recipe", tmp_path / "a.yaml")
    assert second.status == 0, second.err
    a, b = (quantized_layers(load(tmp_path / name)) for name in ("a.pth", "b.pth"))
    assert [n for n, layer in a.items() if layer.is_disabled] == [n for n, layer in b.items() if layer.is_disabled]
    (tmp_path / "a.yaml").write_text("disable: [encoders.camera.backbone.layer1.0.conv1]")
    refused = ptq(root, tmp_path / "c.pth", "--recipe", tmp_path / "a.yaml")
    expect_refusal(refused, "layer1.0.conv1", "shares its input scale", "downsample.0")
    assert not (tmp_path / "c.pth").exists()


def test_frames_and_amax_depend_on_the_seed_and_not_on_the_workers(root, tmp_path):
    runs = {
        name: ptq(root, tmp_path / f"{name}.pth", "--workers", workers, "--seed", seed, frames=3)
        for name, workers, seed in (("a", 0, 1), ("b", 2, 1), ("c", 0, 2))
    }
    assert {run.status for run in runs.values()} == {0}
    a, b, c = (load(tmp_path / f"{name}.pth") for name in runs)
    assert a.ptq["calibration"] == b.ptq["calibration"]
    assert a.ptq["calibration"]["tokens"] != c.ptq["calibration"]["tokens"]
    theirs = named_quantizers(b)
    assert all(torch.equal(q.amax, theirs[name].amax) for name, q in named_quantizers(a).items())


def test_more_batches_than_frames_run_over_what_there_is_and_say_so(root, tmp_path):
    done = ptq(root, tmp_path / "ptq.pth", frames=9)
    assert done.status == 0, done.err
    assert "calibrating on all 4 frames there are; 9 were asked for" in done.out
    assert len(load(tmp_path / "ptq.pth").ptq["calibration"]["tokens"]) == 4


@pytest.mark.parametrize("method", ["entropy", "percentile", "max"])
def test_other_methods_give_other_amax(root, tmp_path, method):
    assert ptq(root, tmp_path / "mse.pth").status == 0
    assert ptq(root, tmp_path / "other.pth", "--method", method).status == 0
    first, second = (named_quantizers(load(tmp_path / name)) for name in ("mse.pth", "other.pth"))
    changed = [name for name in first if not torch.equal(first[name].amax, second[name].amax)]
    assert len(changed) > 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "no/such.yaml"], ["no/such.yaml"]),
        (["--ckpt", "no/such.pth"], ["no/such.pth"]),
        (["--calibrate_batch", "0"], ["--calibrate_batch"]),
        (["--disable", "fusser.*"], ["fusser", "fuser"]),
        (["--disable", "encoders.camera.backbone.layer1.0.conv1"], ["layer1.0.conv1", "downsample.0"]),
        (["--cfg-options", "model.type=BEVFussion"], ["BEVFussion", "BEVFusion"]),
        (["--cfg-options", "model.fuser.kernel=5"], ["ConvFuser", "kernel"]),
        (["--save", "/proc/nowhere/ptq.pth"], ["--save", "/proc/nowhere"]),
        (["--dataset-root", "/nonexistent"], ["/nonexistent"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_options_that_can_not_be_used(root, tmp_path, arguments, words):
    tail = [*arguments, "--cfg-options", "data.train.dataset.ann_file=/nonexistent/a.json"]
    more = tail if arguments[0] == "--dataset-root" else arguments
    expect_refusal(ptq(root, tmp_path / "ptq.pth", *more), *words)
    assert not (tmp_path / "ptq.pth").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu(root, tmp_path):
    expect_refusal(ptq(root, tmp_path / "ptq.pth", "--device", "cuda"), "--device cuda")


def not_yaml(root: Path) -> list:
    (root / "bad.yaml").write_text("a: [1, 2\nb: }")
    return ["--config", root / "bad.yaml"]


def other_architecture(root: Path) -> list:
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, root / "float.pth")
    return []


def truncated_checkpoint(root: Path) -> list:
    data = (root / "float.pth").read_bytes()
    (root / "float.pth").write_bytes(data[: len(data) // 2])
    return []


def missing_image(root: Path) -> list:
    next(root.glob("*CAM_BACK_LEFT*")).unlink()
    return []


def corrupt_image(root: Path) -> list:
    image = next(root.glob("*CAM_BACK_LEFT*"))
    data = image.read_bytes()
    image.unlink()
    image.write_bytes(data[:5000])
    return []


def replace_points(root: Path, points: np.ndarray) -> list:
    file = next(root.glob("*LIDAR_TOP*.bin"))
    file.unlink()
    points.astype(np.float32).tofile(file)
    return []


def empty_cloud(root: Path) -> list:
    return replace_points(root, np.zeros((0, 5)))


def nan_cloud(root: Path) -> list:
    return replace_points(root, np.full((100, 5), np.nan))


def info_without_a_key(root: Path) -> list:
    edit_infos(root / "nuscenes_infos_train.json", lambda i: {k: v for k, v in i.items() if k != "lidar2ego_rotation"})
    return []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (not_yaml, ["bad.yaml"]),
        (other_architecture, ["does not fit", "missing"]),
        (truncated_checkpoint, ["float.pth", "truncated"]),
        (missing_image, ["CAM_BACK_LEFT"]),
        (corrupt_image, ["CAM_BACK_LEFT"]),
        (empty_cloud, ["LIDAR_TOP"]),
        (nan_cloud, ["LIDAR_TOP", "NaN"]),
        (info_without_a_key, ["lidar2ego_rotation"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_input_is_refused_and_an_older_result_kept(copy, tmp_path, damage, words, workers):
    if workers and damage in (not_yaml, other_architecture, truncated_checkpoint, info_without_a_key):
        pytest.skip("is found before any worker starts")
    save = tmp_path / "ptq.pth"
    save.write_bytes(b"an older result")
    expect_refusal(ptq(copy, save, *damage(copy), "--workers", workers, frames=4), *words)
    assert save.read_bytes() == b"an older result"
    assert list(tmp_path.glob(".ptq*")) == []


def test_the_train_pipeline_without_its_database_names_both_ways_out(root, tmp_path):
    done = ptq(root, tmp_path / "ptq.pth", "--calib-pipeline", "train")
    expect_refusal(done, "bevfusion.create_data", "--calib-pipeline test")


RELOAD = """
import sys, torch
batch = torch.load(sys.argv[1], weights_only=False)
model = torch.load(sys.argv[2], weights_only=False).module
with torch.no_grad():
    out = model.extract_features(batch["img"], batch["points"], batch["geometry"])
    found = model(**batch["inputs"])[0]
torch.save({"features": out, "boxes": found["boxes_3d"].tensor, "scores": found["scores_3d"]}, sys.argv[3])
"""


@pytest.mark.slow
def test_full_model_matches_the_reference_and_reloads_bit_for_bit(realframe, golden, tmp_path):
    """As a user runs it: the full ResNet-50 model, a subprocess, a checkpoint in the original layout."""
    from bevfusion.models.view_transform import CameraGeometry

    root = link_frame(tmp_path / "nuscenes", realframe, golden)
    torch.save({"state_dict": golden_state_dict(golden_model(golden))}, root / "bevfusion-det.pth")
    save = tmp_path / "out" / "ptq.pth"
    command = [
        sys.executable,
        "qat/ptq.py",
        "--ckpt",
        root / "bevfusion-det.pth",
        "--dataset-root",
        root,
        "--save",
        save,
    ]
    command += ["--calibrate_batch", 1, "--calib-pipeline", "test", "--device", "cpu", "--calibrator", "stock"]
    command += ["--no-checks"]  # tests/qat/test_checks.py tests what they check
    # The reference's frame has no padded sweeps.
    pad = "test_pipeline.2.pad_empty_sweeps=false"
    done = subprocess.run(
        list(map(str, [*command, "--cfg-options", *options(root, reduced=False), pad])),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "verified in a fresh process, bit for bit" in done.stdout

    model = load(save)
    reference = json.loads((golden / "ptq_reference.json").read_text())
    expected = {our_quantizer(q["name"]): q["amax"] for q in reference["quantizers"] if q["axis"] is None}
    actual = {name: q.amax.item() for name, q in named_quantizers(model).items() if q.axis is None}
    assert actual.keys() == expected.keys()
    far = {name: (actual[name], amax) for name, amax in expected.items() if abs(actual[name] / amax - 1) > 1e-2}
    assert not far

    batch = golden_batch(golden)
    names = ("camera_intrinsics", "camera2lidar", "lidar2image", "img_aug_matrix", "lidar_aug_matrix")
    geometry = CameraGeometry(*(batch[name] for name in names))
    torch.save(
        {"img": batch["img"], "points": batch["points"], "geometry": geometry, "inputs": batch}, tmp_path / "in.pt"
    )
    arguments = ["-W", "ignore", "-c", RELOAD, *map(str, (tmp_path / "in.pt", save, tmp_path / "out.pt"))]
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)
    output = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        here = model.extract_features(batch["img"], batch["points"], geometry)
    assert torch.equal(output["features"], here)
    assert torch.isfinite(output["boxes"]).all()
    assert len(output["scores"]) == 200
