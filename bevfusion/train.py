"""Train the model of a config: ``python -m bevfusion.train --config configs/….yaml``, or with torchrun on several GPUs.

mmcv's runner with the optimizer, schedules, mixed precision, checkpoints and logs of the config. A run's folder holds
its resolved config, its log, and checkpoints from which ``--resume`` goes on.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmcv
import torch
import torch.distributed as dist
import yaml
from mmcv.runner import EpochBasedRunner, Fp16OptimizerHook, build_optimizer, build_runner, get_dist_info
from mmcv.utils import get_logger
from torch import nn

from bevfusion.checkpoint import load_checkpoint
from bevfusion.cli import exit_code
from bevfusion.config import load_config
from bevfusion.errors import InputError
from bevfusion.models import build_model
from bevfusion.training import DistributedModel, TrainingLoader, ValidationHook, training_dataset
from bevfusion.training.loader import seed_everything
from bevfusion.training.runner import LATEST
from bevfusion.training.validation import Validation

logger = logging.getLogger("bevfusion.train")  # run with -m, this module has another name


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bevfusion.train", description="Train the model of a config.")
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML config of the model, data and schedule")
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="folder of the run (default: runs/<config>)")
    parser.add_argument("--dataset-root", metavar="DIR", help="folder of nuScenes, instead of the config's")
    parser.add_argument("--cfg-options", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", metavar="FILE", nargs="?", const=LATEST, help="go on from a checkpoint (default: the run's latest)"
    )
    start.add_argument("--load-from", metavar="FILE", help="start from these weights, as far as they fit")
    parser.add_argument("--epochs", metavar="N", type=int, help="length of the schedule (default: the config's)")
    parser.add_argument("--seed", metavar="N", type=int, help="default: the config's")
    parser.add_argument("--workers", metavar="N", type=int, help="loading processes a GPU (default: the config's)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--no-validate", action="store_true", help="leave out the validation between epochs")
    args = parser.parse_args(arguments)
    for name, least in (("epochs", 1), ("seed", 0), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, not {value}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Train; the exit code is 2 on bad input."""
    args = parse_arguments(arguments)
    try:
        return exit_code(lambda: train(args))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """Read the config, build everything, run the epochs.

    Raises:
        InputError: the config, the data or a checkpoint can't be used.
    """
    device = choose_device(args.device)
    cfg = read_config(args)
    run_dir = args.run_dir or default_run_dir(args.config)
    resume = args.resume or cfg.get("resume_from")
    prepare_folder(run_dir, cfg, bool(resume))
    rank, world_size = get_dist_info()
    torch.backends.cudnn.benchmark = bool(cfg.get("cudnn_benchmark"))
    torch.use_deterministic_algorithms(bool(cfg.get("deterministic")), warn_only=True)

    seed_everything(cfg.seed)
    loader = TrainingLoader(
        training_dataset(cfg), cfg.data.samples_per_gpu, cfg.data.workers_per_gpu, device, cfg.seed, rank, world_size
    )
    interval = 0 if args.no_validate else cfg.get("evaluation", {}).get("interval", 0)
    validation = Validation(cfg, cfg.data.workers_per_gpu) if interval else None
    model = prepare_model(cfg, device, args.load_from or cfg.get("load_from"), bool(resume))
    runner = prepare_runner(cfg, model, run_dir, device)
    if validation:
        runner.register_hook(ValidationHook(validation, interval), priority="LOW")
    if resume:
        runner.resume(str(run_dir / LATEST if resume == LATEST else resume))
    frames = len(loader.dataset)
    logger.info("%d frames an epoch, %d steps; %s, %d processes", frames, len(loader), device, world_size)
    runner.run([loader], [("train", 1)])


def choose_device(name: str) -> torch.device:
    """Device of this process; joins the other processes where torchrun started it.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} sees no CUDA device; use --device cpu")
    cuda = name != "cpu" and torch.cuda.is_available()
    if "LOCAL_RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def read_config(args: argparse.Namespace) -> mmcv.Config:
    """The config with the command line's options applied."""
    root = [] if args.dataset_root is None else [f"dataset_root={json.dumps(os.path.join(args.dataset_root, ''))}"]
    given = {"max_epochs": args.epochs, "seed": args.seed, "data.workers_per_gpu": args.workers}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    cfg = load_config(args.config, [*root, *options, *args.cfg_options])
    absent = [key for key in ("model", "data", "optimizer", "runner") if not cfg.get(key)]
    if absent:
        raise InputError(f"config {args.config} has no {', '.join(absent)}: it is not a config to train with")
    return cfg


def default_run_dir(config: str) -> Path:
    """runs/ and the config's path below the folder configs."""
    path = Path(config).with_suffix("")
    parts = path.parts
    below = parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-1:]
    return Path("runs", *below)


def prepare_folder(run_dir: Path, cfg: mmcv.Config, resume: bool) -> None:
    """Make the run's folder, with the resolved config and the log in it.

    Raises:
        InputError: another run is in it.
    """
    if (run_dir / LATEST).exists() and not resume:
        raise InputError(f"{run_dir} holds a run already: go on with --resume, or choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    rank, _ = get_dist_info()
    get_logger("mmcv").setLevel(logging.WARNING)  # it would list how every single parameter was initialised
    handlers: list[logging.Handler] = []
    if rank == 0:
        plain = json.loads(json.dumps(cfg._cfg_dict.to_dict()))
        (run_dir / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        handlers = [logging.StreamHandler(), logging.FileHandler(run_dir / "train.log")]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    ours = logging.getLogger("bevfusion")
    ours.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    ours.handlers, ours.propagate = handlers, False


def prepare_model(cfg: mmcv.Config, device: torch.device, load_from: str | None, resume: bool) -> nn.Module:
    """Build the model with its initial weights, on the device.

    Raises:
        InputError: pretrained weights can't be had, or `load_from` has nothing that fits.
    """
    try:
        model = build_model(cfg.model, pretrained=not resume)
    except OSError as error:
        raise InputError(
            f"can't get the pretrained weights that an init_cfg of the config names ({error}); start without them: "
            "--cfg-options model.encoders.camera.backbone.init_cfg=null"
        ) from error
    if load_from and not resume:
        report = load_checkpoint(model, load_from, allow_partial=True)
        if {*report.missing, *report.misshaped}.issuperset(name for name, _ in model.named_parameters()):
            raise InputError(f"{load_from} has no weight that fits the model of the config: {report}")
        logger.info("weights from %s%s", load_from, "" if report.complete else f": {report}")
    model = model.to(device)
    if not dist.is_initialized():
        return model
    find_unused = bool(cfg.get("find_unused_parameters"))
    return DistributedModel(model, [device] if device.type == "cuda" else None, find_unused_parameters=find_unused)


def prepare_runner(cfg: mmcv.Config, model: nn.Module, run_dir: Path, device: torch.device) -> EpochBasedRunner:
    """Build the runner with the hooks of the config.

    Raises:
        InputError: the config names an unknown schedule, or one with unknown settings.
    """
    try:
        optimizer = build_optimizer(model, cfg.optimizer)
        defaults = {"model": model, "optimizer": optimizer, "work_dir": str(run_dir), "logger": logger, "meta": {}}
        runner = build_runner(cfg.runner, default_args=defaults)
        runner.timestamp = "train"  # stem of the JSON log's name
        runner.register_training_hooks(
            cfg.get("lr_config"),
            optimizer_hook_config(cfg, device),
            cfg.get("checkpoint_config"),
            log_config(cfg),
            cfg.get("momentum_config"),
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the config's optimizer, runner, schedules or hooks can't be built: {error}") from error
    return runner


def optimizer_hook_config(cfg: mmcv.Config, device: torch.device) -> Any:
    """The optimizer's hook, with mixed precision where the config asks for it and the device has it."""
    config: Mapping[str, Any] = cfg.get("optimizer_config") or {}
    if not cfg.get("fp16"):
        return dict(config)
    if device.type != "cuda":
        logger.info("the config's fp16 needs a GPU: training in single precision")
        return dict(config)
    return Fp16OptimizerHook(**config, **cfg.fp16, distributed=dist.is_initialized())


def log_config(cfg: mmcv.Config) -> dict | None:
    """The config's loggers, without TensorBoard where it is not installed."""
    config = cfg.get("log_config")
    if not config or find_spec("tensorboard"):
        return config
    kept = [hook for hook in config.hooks if hook.type != "TensorboardLoggerHook"]
    return {**config, "hooks": kept}


if __name__ == "__main__":
    sys.exit(main())
