"""`qat/ptq.py` interrupted, killed, gone on with, shared by processes, and run from kept statistics."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lean.amax import choose_amax
from lean.statistics import Statistics
from lean.switches import named_quantizers
from qat.arguments import DEFAULT_CONFIG
from tests.conftest import ROOT
from tests.qat.ptq_samples import Outcome, edit_infos, link_frame, options, run_here, with_reduced_model

FRAMES = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory, realframe, golden) -> Path:
    """A data root of five frames, no two alike, with the reduced model's checkpoint."""
    folder = link_frame(tmp_path_factory.mktemp("data") / "nuscenes", realframe, golden, frames=FRAMES)

    def turn_cameras(info: dict) -> dict:
        cameras, turn = list(info["cams"].values()), int(info["token"], 16)
        paths = [camera["data_path"] for camera in cameras]
        for i, camera in enumerate(cameras):
            camera["data_path"] = paths[(i + turn) % len(paths)]
        return info

    edit_infos(folder / "nuscenes_infos_train.json", turn_cameras)
    return with_reduced_model(folder)


def arguments(root: Path, save: Path, *more: object) -> list[str]:
    given = ["--config", ROOT / DEFAULT_CONFIG, "--ckpt", root / "float.pth", "--dataset-root", root, "--save", save]
    given += ["--device", "cpu", "--workers", 0, "--no-checks", "--calib-pipeline", "test", "--calibrate_batch", FRAMES]
    given += ["--stats", save.with_suffix(".npz"), "--save-every", 1, "--cfg-options", *options(root), *more]
    return list(map(str, given))


def start(root: Path, save: Path, *more: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Run it in a process of its own, with as many threads as this one has."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-W", "ignore", *launcher, "qat/ptq.py", "--no-verify", *arguments(root, save, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def partial(save: Path) -> Path:
    return save.with_name(f"{save.name}.partial.npz")


def wait_for_frames(process: subprocess.Popen, file: Path, frames: int) -> None:
    """Return when the file of unfinished statistics holds this many frames."""
    for _ in range(2000):
        if file.exists() and Statistics.load(file).frames >= frames:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run saves nothing")


def amax(save: Path) -> dict[str, torch.Tensor]:
    return {name: q.amax for name, q in named_quantizers(torch.load(save, weights_only=False).module).items()}


def assert_same_result(save: Path, whole: Path) -> None:
    """Equal statistics, and equal amax, bit for bit."""
    assert Statistics.load(save.with_suffix(".npz")) == Statistics.load(whole.with_suffix(".npz"))
    expected = amax(whole)
    assert expected.keys() == amax(save).keys()
    assert all(torch.equal(value, expected[name]) for name, value in amax(save).items())


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    """The result of an uninterrupted run."""
    save = tmp_path_factory.mktemp("whole") / "ptq.pth"
    done = run_here(*arguments(root, save))
    assert done.status == 0, done.err
    assert not partial(save).exists()
    return save


def test_interrupted_then_killed_then_resumed_it_gives_the_uninterrupted_result(root, whole, tmp_path):
    save = tmp_path / "ptq.pth"
    first = start(root, save)
    wait_for_frames(first, partial(save), 1)
    first.send_signal(signal.SIGINT)
    error = first.communicate(timeout=120)[1]
    assert first.returncode == 130, error
    assert "--resume goes on" in error
    assert "Traceback" not in error
    saved = Statistics.load(partial(save)).frames
    assert 1 <= saved < FRAMES

    if saved < FRAMES - 1:
        second = start(root, save, "--resume")
        wait_for_frames(second, partial(save), saved + 1)
        second.kill()
        assert second.wait() == -signal.SIGKILL
    assert not save.exists()

    done = run_here(*arguments(root, save, "--resume"))
    assert done.status == 0, done.err
    assert "going on after" in done.out
    assert not partial(save).exists()
    assert_same_result(save, whole)


def test_resuming_without_anything_to_resume_is_a_whole_run(root, whole, tmp_path):
    assert run_here(*arguments(root, tmp_path / "ptq.pth", "--resume")).status == 0
    assert_same_result(tmp_path / "ptq.pth", whole)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--cfg-options", "model.heads.object.nms_kernel_size=5"], "model.heads.object.nms_kernel_size was 3, now it"),
        (["--cfg-options", "data.samples_per_gpu=7"], "config.data.samples_per_gpu was"),
        (["--seed", 5], "seed was 0, now it is 5"),
        (["--calibrate_batch", 3], "frames was 5 items, now it is 3 items"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_file_of_another_run_is_refused(root, whole, tmp_path, more, words):
    save = tmp_path / "ptq.pth"
    shutil.copy(whole.with_suffix(".npz"), partial(save))
    expect_refusal(run_here(*arguments(root, save, "--resume", *more)), str(partial(save)), words)
    assert partial(save).exists()


def test_the_file_of_another_checkpoint_is_refused(root, whole, tmp_path):
    save = tmp_path / "ptq.pth"
    shutil.copy(whole.with_suffix(".npz"), partial(save))
    state = torch.load(root / "float.pth")
    state["state_dict"]["fuser.0.weight"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    expect_refusal(run_here(*arguments(root, save, "--resume", "--ckpt", tmp_path / "other.pth")), "checkpoint was")


def expect_refusal(done: Outcome, *words: str) -> None:
    assert done.status == 2, done.out + done.err
    line = next(line for line in done.err.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in line, line


def from_stats(root: Path, save: Path, stats: Path, *more: object) -> Outcome:
    given = ["--config", ROOT / DEFAULT_CONFIG, "--ckpt", root / "float.pth", "--dataset-root", "/nonexistent"]
    given += ["--device", "cpu", "--save", save, "--from-stats", stats, "--cfg-options", *options(root), *more]
    return run_here(*given)


def test_kept_statistics_give_every_method_without_data(root, whole, tmp_path):
    stats = whole.with_suffix(".npz")
    for method in ("mse", "entropy", "percentile"):
        done = from_stats(root, tmp_path / "ptq.pth", stats, "--method", method, "--percentile", 99)
        assert done.status == 0, done.err
        found = amax(tmp_path / "ptq.pth")
        if method == "mse":
            assert all(torch.equal(value, found[name]) for name, value in amax(whole).items())
        for name, value in choose_amax(Statistics.load(stats).histograms, method, percentile=99).items():
            assert found[name].item() == value
    model = torch.load(tmp_path / "ptq.pth", weights_only=False).module
    assert len(model.ptq["calibration"]["tokens"]) == FRAMES


def test_statistics_of_another_model_are_refused(root, whole, tmp_path):
    stats, other = whole.with_suffix(".npz"), ["--cfg-options", "model.heads.object.nms_kernel_size=5"]
    expect_refusal(from_stats(root, tmp_path / "ptq.pth", stats, *other), "--from-stats", "nms_kernel_size")
    expect_refusal(from_stats(root, tmp_path / "ptq.pth", tmp_path / "no.npz"), "not found", "no.npz")
    expect_refusal(from_stats(root, tmp_path / "ptq.pth", stats, "--resume"), "--resume", "--from-stats")
    expect_refusal(from_stats(root, tmp_path / "ptq.pth", stats, "--calibrator", "stock"), "--calibrator stock")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_processes_give_the_result_of_one(root, whole, tmp_path):
    save = tmp_path / "ptq.pth"
    run = start(root, save, "--save-every", 2, launcher=TORCHRUN)
    out, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    assert out.count("wrote ") == 2  # both forms, by one process
    assert_same_result(save, whole)


def test_a_process_that_fails_ends_the_run_with_its_error(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "nuscenes", symlinks=True)
    cloud = next(path for path in copy.iterdir() if path.name.endswith(".bin"))
    short = copy / "short.bin"
    short.write_bytes(cloud.read_bytes()[:-3])

    def damage_one(info: dict) -> dict:
        return info | {"lidar_path": str(short)} if int(info["token"], 16) == 3 else info

    edit_infos(copy / "nuscenes_infos_train.json", damage_one)
    run = start(copy, tmp_path / "ptq.pth", launcher=TORCHRUN)
    error = run.communicate(timeout=180)[1]
    assert run.returncode != 0
    assert f"error: frame {3:032x}: point cloud" in error
    assert "short.bin" in error
    assert not (tmp_path / "ptq.pth").exists()
