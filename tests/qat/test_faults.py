"""Faults while `qat/ptq.py` runs, injected for real: each gives a correct result, or one line and nothing is lost."""

import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bevfusion.config import load_config
from bevfusion.data import load_infos
from bevfusion.ops.voxelize import Voxelization
from lean.statistics import Statistics
from lean.switches import named_quantizers
from qat import collection, tables
from qat.collection import partial_file
from qat.frames import choose_frames
from tests.qat.demo_samples import CONFIG, SMALLER, TRAINING_FRAMES, ptq, write_world
from tests.qat.ptq_samples import expect_refusal


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(root, tmp_path) -> Path:
    """A copy for a test that damages it."""
    return shutil.copytree(root, tmp_path / "world")


def quick(root: Path, save: Path, *more: object, frames: int = 3):
    return ptq(root, save, "--no-checks", *more, frames=frames)


def saved(path: Path) -> torch.nn.Module:
    return torch.load(path, weights_only=False).module


def cut_in_the_middle(file: Path) -> None:
    """An image whose header is sound."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:5000])


def nan_inside(file: Path) -> None:
    points = np.fromfile(file, dtype=np.float32)
    points[len(points) // 2] = np.nan
    points.tofile(file)


def planned(world: Path, frames: int) -> list[str]:
    """The tokens of a run of that many frames, in order."""
    cfg = load_config(CONFIG, [f"dataset_root={world}/", *SMALLER])
    return list(choose_frames(cfg, "test", frames, cfg.seed).tokens)


def sensor_file(world: Path, token: str, key: str) -> Path:
    frame = next(frame for frame in load_infos(world / "nuscenes_infos_train.pkl")[0] if frame.token == token)
    return world / {"lidar": frame.lidar_path, "camera": frame.cameras.paths[2]}[key].removeprefix(f"{world}/")


def test_frames_that_can_not_be_read_are_replaced_and_listed(world, root, tmp_path):
    """Bad in three ways: statistics are those of exactly the frames that are listed, for any number of workers."""
    chosen = planned(root, 3)
    nan_inside(sensor_file(world, chosen[0], "lidar"))
    cut_in_the_middle(sensor_file(world, chosen[2], "camera"))
    spare = next(token for token in planned(root, TRAINING_FRAMES) if token not in chosen)
    sensor_file(world, spare, "camera").unlink()

    runs = {}
    for workers in (0, 2):
        save = tmp_path / f"{workers}.pth"
        options = ("--stats", save.with_suffix(".npz"), "--on-bad-frame", "skip", "--workers", workers)
        done = quick(world, save, *options)
        assert done.status == 0, done.err
        assert f"{chosen[0]}: replaced by" in done.out
        assert "frames that could not be read: 2" in done.out
        runs[workers] = Statistics.load(save.with_suffix(".npz"))
    assert runs[0] == runs[2]
    made = runs[0].made_of
    assert set(made["replaced"]) == {chosen[0], chosen[2]}
    assert [made["replaced"].get(token, token) for token in chosen] == made["frames"]
    assert len(set(made["frames"]) - {spare}) == 3
    artifact = saved(tmp_path / "0.pth").ptq["calibration"]
    assert artifact["tokens"] == made["frames"]
    assert artifact["replaced"] == made["replaced"]

    only = keep_only(root, tmp_path / "only", made["frames"])
    assert quick(only, tmp_path / "only.pth", "--stats", tmp_path / "only.npz").status == 0
    expected = Statistics.load(tmp_path / "only.npz")
    assert sorted(expected.made_of["frames"]) == sorted(made["frames"])
    assert runs[0].histograms == expected.histograms

    expect_refusal(quick(world, tmp_path / "stop.pth"), chosen[0], "NaN")


def keep_only(root: Path, copy: Path, tokens: list[str]) -> Path:
    """A world of these training frames alone."""
    shutil.copytree(root, copy)
    path = copy / "nuscenes_infos_train.pkl"
    content = pickle.loads(path.read_bytes())
    content["infos"] = [info for info in content["infos"] if info["token"] in tokens]
    path.write_bytes(pickle.dumps(content))
    return copy


def test_without_a_spare_bad_frames_are_left_out_and_none_at_all_is_an_error(world, tmp_path):
    clouds = sorted(world.glob("samples/LIDAR_TOP/*.bin"))
    for file in clouds[:2]:
        nan_inside(file)
    done = quick(world, tmp_path / "ptq.pth", "--on-bad-frame", "skip", frames=TRAINING_FRAMES)
    assert done.out.count("left out, no other frame was left") == 2, done.err
    assert len(saved(tmp_path / "ptq.pth").ptq["calibration"]["tokens"]) == TRAINING_FRAMES - 2
    for file in clouds[2:]:
        nan_inside(file)
    expect_refusal(
        quick(world, tmp_path / "b.pth", "--on-bad-frame", "skip", frames=2), "none of the 2 frames can be read"
    )
    with_checks = ptq(world, tmp_path / "b.pth", "--on-bad-frame", "skip", frames=2)
    expect_refusal(with_checks, "none of the 2 frames can be read")


def test_a_run_that_skips_goes_on_where_it_was_stopped(world, tmp_path, monkeypatch):
    chosen = planned(world, 3)
    nan_inside(sensor_file(world, chosen[0], "lidar"))
    skip = ("--on-bad-frame", "skip", "--stats")
    assert quick(world, tmp_path / "whole.pth", *skip, tmp_path / "whole.npz").status == 0
    save = tmp_path / "ptq.pth"
    with monkeypatch.context() as patch:
        patch.setattr(collection, "to_device", at_call(1, lambda: signal.raise_signal(signal.SIGTERM)))
        done = quick(world, save, *skip, tmp_path / "parts.npz")
    assert done.status == 128 + signal.SIGTERM
    assert "keeps 2 frames: the same command with --resume goes on" in done.err
    assert Statistics.load(partial_file(save)).made_of["unreadable"] == [0]
    done = quick(world, save, *skip, tmp_path / "parts.npz", "--resume")
    assert done.status == 0, done.err
    assert Statistics.load(tmp_path / "parts.npz") == Statistics.load(tmp_path / "whole.npz")
    assert not partial_file(save).exists()


def at_call(number: int, act):
    """The model's arguments, as they are, but at the call with this number `act` is called first."""
    calls = 0

    def to_device(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*arguments)

    original = collection.to_device
    return to_device


def kill_a_worker() -> None:
    """End one of the data loading processes, and wait until the system has told us."""
    from multiprocessing import active_children

    child = active_children()[0]
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


@pytest.mark.parametrize(
    ("act", "workers", "words"),
    [
        (kill_a_worker, 1, ["a data loading process has died", "--workers"]),
        (out_of_memory, 0, ["out of memory in frame ", "max_voxels"]),
    ],
)
def test_a_run_on_a_machine_at_its_limits(root, tmp_path, monkeypatch, act, workers, words):
    save = tmp_path / "ptq.pth"
    save.write_bytes(b"an older result")
    monkeypatch.setattr(collection, "to_device", at_call(2, act))
    done = quick(root, save, "--workers", workers, "--save-every", 1, frames=4)
    expect_refusal(done, *words, "ptq.pth.partial.npz keeps ", "--resume goes on")
    assert save.read_bytes() == b"an older result"
    assert {file.name for file in tmp_path.iterdir()} == {"ptq.pth", "ptq.pth.partial.npz"}
    monkeypatch.undo()
    assert quick(root, save, "--resume", frames=4).status == 0


STEPS = ("import", "load checkpoint", "find frames", "insert quantizers", "preflight", "fold batch norm")
STEPS = (*STEPS, "calibrate", "disable and check", "save")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_signal_at_any_step_ends_the_run_and_leaves_nothing_behind(root, tmp_path, monkeypatch, step, number, word):
    if number == signal.SIGINT and step not in ("import", "save"):
        pytest.skip("as SIGTERM")
    save = tmp_path / "ptq.pth"
    save.write_bytes(b"an older result")
    time_of = tables.Steps.step

    def interrupted(self, name):
        if name == step:
            signal.raise_signal(number)
        return time_of(self, name)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(tables.Steps, "step", interrupted)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    done = quick(root, save, frames=1)
    signal.signal(signal.SIGINT, ours)
    assert (done.status, done.err.splitlines()[-1]) == (128 + number, word)
    assert save.read_bytes() == b"an older result"
    assert [file.name for file in tmp_path.iterdir()] == ["ptq.pth"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_the_result_is_written(root, tmp_path, monkeypatch):
    save = tmp_path / "ptq.pth"
    save.write_bytes(b"an older result")
    write = torch.save

    def half(model, file):
        write(model, file)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(torch, "save", half)
    assert quick(root, save, frames=1).status == 143
    assert save.read_bytes() == b"an older result"
    assert [file.name for file in tmp_path.iterdir() if "partial" not in file.name] == ["ptq.pth"]


def test_black_images_and_a_crowded_cloud_are_no_faults_and_a_cloud_out_of_reach_is_one(world, tmp_path):
    rng = np.random.default_rng(0)
    first, second, third = planned(world, 3)
    Image.new("RGB", (160, 90)).save(sensor_file(world, first, "camera"))
    crowd = rng.uniform([-3, -3, -1, 0, 0], [3, 3, -0.5, 255, 31], (300_000, 5)).astype(np.float32)
    crowd.tofile(sensor_file(world, second, "lidar"))
    for file in (sensor_file(world, third, "lidar"), *world.glob("sweeps/LIDAR_TOP/*.bin")):
        np.full((100, 5), 90, dtype=np.float32).tofile(file)
    done = quick(world, tmp_path / "ptq.pth")
    expect_refusal(done, third, "no point inside point_cloud_range")
    done = quick(world, tmp_path / "ptq.pth", "--on-bad-frame", "skip")
    assert f"{third}: replaced by" in done.out, done.err
    model = saved(tmp_path / "ptq.pth")
    assert model.ptq["calibration"]["tokens"][:2] == [first, second]
    assert all(torch.isfinite(q.amax).all() for q in named_quantizers(model).values() if not q._disabled)


def test_a_crowded_cloud_keeps_to_the_limits_of_the_config():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(300_000, 5, generator=generator) * torch.tensor([50.0, 50, 6, 255, 1]) - 25
    layer = Voxelization([0.1, 0.1, 0.2], [-25, -25, -25, 25, 25, -19], 10, [20_000, 30_000]).eval()
    features, coordinates = layer([points])
    assert features.shape == (30_000, 5)
    assert len(torch.unique(coordinates, dim=0)) == 30_000
