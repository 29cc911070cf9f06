"""Training: every parameter learns, losses fall, runs resume, several processes agree, and bad input is one line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from bevfusion import train
from bevfusion.checkpoint import load_checkpoint, read_file
from bevfusion.config import load_config
from bevfusion.create_data import create_data
from bevfusion.models import build_model
from bevfusion.training import TrainingLoader, ablation, publish, training_dataset
from bevfusion.training.runner import LATEST
from tests.bevfusion.tiny_nuscenes import TinyNuScenes
from tests.conftest import ROOT

DEMO = ROOT / "configs/demo/camera+lidar/resnet50.yaml"
NUSCENES = ROOT / "configs/nuscenes/det/transfusion/secfpn"
GRID = (
    "point_cloud_range=[-25.6,-25.6,-5.0,25.6,25.6,15.0]",  # the tiny world's clutter is up to 12 m above the ground
    "voxel_size=[0.4,0.4,0.5]",
    "model.encoders.lidar.backbone.sparse_shape=[128,128,41]",
    "model.heads.object.num_proposals=20",
    "log_config.interval=1",
)
CAMERA = (
    "image_size=[32,64]",
    *(f"model.encoders.camera.vtransform.{axis}bound=[-25.6,25.6,1.6]" for axis in "xy"),
    "model.encoders.camera.vtransform.dbound=[1.0,31.0,2.0]",
)
SMALL = (
    *GRID,
    *CAMERA,
    *(f"{which}_pipeline.4.resize_lim=[0.42,0.42]" for which in ("train", "test")),
    "data.train.times=1",
    "data.samples_per_gpu=2",
    "checkpoint_config.max_keep_ckpts=2",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A nuScenes data set of three training and three validation frames."""
    root = tmp_path_factory.mktemp("world")
    create_data(TinyNuScenes(root).save(), "v1.0-mini", max_sweeps=2, database=False)
    return root


def arguments(world, run_dir, *more, config=DEMO, options=SMALL):
    given = ["--config", config, "--dataset-root", world, "--run-dir", run_dir, "--device", "cpu", "--workers", "0"]
    return [*map(str, given), *more, "--cfg-options", *options]


def run(*args, **kwargs):
    return train.main(arguments(*args, **kwargs))


def logged(run_dir, mode="train"):
    lines = [json.loads(line) for line in (run_dir / "train.log.json").read_text().splitlines()]
    return [line for line in lines if line.get("mode") == mode]


def weights(checkpoint):
    return read_file(checkpoint)["state_dict"]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Folder of a complete run of two epochs, two steps each, with validation."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    assert run(world, folder, "--epochs", "2") == 0
    return folder


def test_a_run_leaves_its_config_log_and_a_checkpoint_that_loads(finished):
    cfg = load_config(finished / "config.yaml")
    assert cfg.max_epochs == cfg.runner.max_epochs == 2
    assert load_checkpoint(build_model(cfg.model), finished / LATEST).complete
    meta = read_file(finished / LATEST)["meta"]
    assert (meta["epoch"], meta["iter"]) == (2, 4)
    assert "cpu, 1 processes" in (finished / "train.log").read_text()
    rates = [line["lr"] for line in logged(finished)]
    assert rates[0] == cfg.optimizer.lr  # the cycle begins there, rises tenfold and falls again
    assert rates[1] == pytest.approx(10 * cfg.optimizer.lr)
    assert rates[1] > rates[2] > rates[3]
    validation = logged(finished, "val")[-1]
    assert 0 <= validation["val/mAP"] <= 1
    assert "val/ap/pedestrian" in validation


def test_resuming_goes_on_as_if_it_had_not_been_interrupted(finished, world, tmp_path):
    assert run(world, tmp_path, "--epochs", "2", "--no-validate", "--resume", str(finished / "epoch_1.pth")) == 0
    resumed, whole = weights(tmp_path / LATEST), weights(finished / LATEST)
    before = weights(finished / "epoch_1.pth")
    assert not torch.equal(before["fuser.0.weight"], whole["fuser.0.weight"])
    torch.testing.assert_close(resumed, whole)


def test_another_seed_gives_another_model(finished, world, tmp_path):
    assert run(world, tmp_path, "--epochs", "1", "--no-validate", "--seed", "7") == 0
    assert not torch.equal(weights(tmp_path / LATEST)["fuser.0.weight"], weights(finished / LATEST)["fuser.0.weight"])


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("camera+lidar/resnet50/convfuser.yaml", (*CAMERA, "model.encoders.camera.backbone.base_channels=8")),
        ("lidar/voxelnet_0p075.yaml", ("image_size=[32,64]",)),
    ],
)
def test_one_step_of_the_full_configs_reaches_every_parameter(golden, realframe, name, more):
    neck = ("model.encoders.camera.neck.in_channels=[64,128,256]",) if "resnet50" in name else ()
    cfg = load_config(NUSCENES / name, [*GRID, *more, *neck, f"dataset_root={realframe}/"])
    inner = cfg.data.train.dataset
    inner.ann_file = str(next(realframe.glob("*.pkl")))
    inner.pipeline = [step for step in inner.pipeline if step.type != "ObjectPaste"]
    loader = TrainingLoader(training_dataset(cfg), 1, 0, torch.device("cpu"), seed=0)
    loader.set_epoch(0)
    cfg.model.encoders.get("camera") and cfg.model.encoders.camera.backbone.pop("init_cfg")
    model = build_model(cfg.model, pretrained=True).train()
    step = model.train_step(next(iter(loader)))
    step["loss"].backward()
    assert np.isfinite(step["log_vars"]["loss"])
    assert step["log_vars"]["loss"] == pytest.approx(
        sum(value for key, value in step["log_vars"].items() if key.startswith("loss/")), rel=1e-5
    )
    idle = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


def test_a_tiny_model_learns_two_frames_by_heart(world, tmp_path):
    options = (*SMALL, "data.train.dataset.load_interval=2", "data.train.times=60", "optimizer.lr=3.0e-4")
    options += tuple(f"train_pipeline.{step}.is_train=false" for step in (4, 5))
    assert run(world, tmp_path, "--epochs", "1", "--no-validate", options=options) == 0
    lines = logged(tmp_path)
    heatmap = [line["loss/object/loss_heatmap"] for line in lines]
    boxes = [line["loss/object/layer_-1_loss_bbox"] for line in lines]
    assert len(lines) == 60
    assert np.mean(heatmap[-5:]) < 0.4 * heatmap[0]
    assert np.mean(boxes[-5:]) < 0.5 * boxes[0]
    assert np.mean([line["stats/object/matched_ious"] for line in lines[-5:]]) > 0.05


def test_transforms_hear_of_the_epoch_through_every_wrapper(world):
    mask = "{type: GridMask, use_h: true, use_w: true, max_epoch: 4, prob: 0.8, fixed_prob: false}"
    cfg = load_config(DEMO, [*SMALL, f"dataset_root={world}/", f"train_pipeline.6={mask}"])
    loader = TrainingLoader(training_dataset(cfg), 1, 0, torch.device("cpu"), seed=0)
    loader.set_epoch(3)
    (transform,) = [t for t in loader.dataset.dataset.pipeline.transforms if type(t).__name__ == "GridMask"]
    assert transform.prob == pytest.approx(0.6)


def test_starting_from_weights_that_fit_in_part(finished, world, tmp_path, caplog):
    state = {k: v for k, v in weights(finished / LATEST).items() if k.startswith("encoders.lidar")}
    torch.save({"state_dict": {k: torch.full_like(v, 0.01) for k, v in state.items()}}, tmp_path / "lidar.pth")
    cfg = load_config(finished / "config.yaml")
    model = train.prepare_model(cfg, torch.device("cpu"), str(tmp_path / "lidar.pth"), resume=False)
    assert (model.encoders["lidar"]["backbone"].conv_input[0].weight == 0.01).all()
    assert not (model.encoders["camera"]["backbone"].conv1.weight == 0.01).any()
    torch.save({"state_dict": {"other": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(train.InputError, match="no weight that fits"):
        train.prepare_model(cfg, torch.device("cpu"), str(tmp_path / "other.pth"), resume=False)


def test_two_processes_share_the_frames_of_an_epoch(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = (*SMALL, "data.samples_per_gpu=1", "checkpoint_config.max_keep_ckpts=1")
    command += ["bevfusion.train", *arguments(world, tmp_path / "ddp", "--epochs", "1", options=options)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cpu, 2 processes" in done.stderr
    assert len(logged(tmp_path / "ddp")) == 2  # three frames, shared out and filled up: two steps of two frames
    assert "val/mAP" in logged(tmp_path / "ddp", "val")[-1]
    cfg = load_config(tmp_path / "ddp/config.yaml")
    assert load_checkpoint(build_model(cfg.model), tmp_path / "ddp" / LATEST).complete


def test_published_weights_are_small_plain_and_load(finished, tmp_path, capsys):
    target = tmp_path / "demo.pth"
    assert publish.main([str(finished / LATEST), str(target), "--half"]) == 0
    assert "MB" in capsys.readouterr().out
    assert target.stat().st_size < 0.25 * (finished / LATEST).stat().st_size
    content = torch.load(target, weights_only=True)
    assert content["meta"]["epoch"] == 2
    assert "optimizer" not in content
    model = build_model(load_config(finished / "config.yaml").model)
    assert load_checkpoint(model, target).complete
    state = model.state_dict()
    for key, value in weights(finished / LATEST).items():
        exact = not key.endswith(("weight", "bias"))
        torch.testing.assert_close(state[key], value, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-6)


def test_ablation_silences_one_branch_and_restores_it(finished, world, tmp_path, capsys):
    out = tmp_path / "scores.json"
    given = ["--config", finished / "config.yaml", "--ckpt", finished / LATEST, "--workers", "0", "--out", out]
    assert ablation.main([*map(str, given)]) == 0
    assert "without camera" in capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert list(scores) == ["whole", "without camera", "without lidar"]
    assert scores["whole"]["frames"] == 3

    model = build_model(load_config(finished / "config.yaml").model)
    last = model.encoders["lidar"]["backbone"]
    voxels = (torch.ones(1, 5), torch.zeros(1, 4, dtype=torch.int32), 1)
    with torch.no_grad():
        with ablation.without(model, "lidar"):
            assert not last(*voxels).any()
        assert last(*voxels).any()


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ((), ("model.fuser.type=ConvFusser",), "ConvFuser"),
        ((), ("optimizer.type=Adamm",), "optimizer"),
        ((), ("lr_config.policy=zigzag",), "ZigzagLrUpdaterHook"),
        ((), ("data.train.dataset.ann_file=missing.pkl",), "missing.pkl"),
        ((), ("model=null",), "no model"),
        (("--resume",), (), "latest.pth"),
        (("--resume", "missing.pth"), (), "missing.pth"),
        (("--load-from", "missing.pth"), (), "missing.pth"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, capsys, more, options, message):
    assert run(world, tmp_path / "run", "--no-validate", *more, options=(*SMALL, *options)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in lines[0]


def test_a_folder_with_another_run_is_left_alone(finished, world, capsys):
    before = (finished / "config.yaml").read_bytes()
    assert run(world, finished, "--epochs", "5") == 2
    assert "--resume" in capsys.readouterr().err
    assert (finished / "config.yaml").read_bytes() == before


def test_resuming_needs_a_training_checkpoint_of_this_model(finished, world, tmp_path, capsys):
    torch.save({"state_dict": {}, "meta": {}}, tmp_path / "other.pth")
    assert run(world, tmp_path / "run", "--no-validate", "--resume", str(tmp_path / "other.pth")) == 2
    assert "--load-from" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, capsys):
    assert run(world, tmp_path, "--no-validate", options=(*SMALL, "optimizer.lr=1.0e+30")) == 2
    assert "not finite in epoch" in capsys.readouterr().err


def test_missing_pretrained_weights_say_how_to_do_without(world, tmp_path, capsys):
    init = "model.encoders.camera.backbone.init_cfg={type: Pretrained, checkpoint: missing/resnet.pth}"
    assert run(world, tmp_path, options=(*SMALL, init)) == 2
    assert "init_cfg=null" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--epochs", "0"), ("--seed", "-1"), ("--workers", "-1"), ("--device", "tpu")])
def test_options_out_of_range_are_refused(option, world, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train.parse_arguments([*arguments(world, tmp_path), *option])
    assert stopped.value.code == 2
