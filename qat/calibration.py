"""The steps of `qat/ptq.py`: from a float checkpoint and training frames to a saved quantised model."""

import argparse
import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bevfusion.checkpoint import load_checkpoint
from bevfusion.data import calibration_loader
from bevfusion.models import build_model
from lean.calibrate import calibrate_weights, check_calibrated, model_device
from lean.checked_file import holds_checked, need_safetensors
from lean.distributed import local_world, rank
from lean.files import check_writable
from lean.quantize import calibrate_model, set_quantizer_fast
from lean.ranges import Method, set_amax
from lean.recipe import Recipe
from lean.statistics import Statistics
from lean.switches import disable_layers, named_quantizers, quantizer_flags
from qat import common
from qat.collection import collect, forward_of, partial_file
from qat.frames import Frames, choose_frames
from qat.saving import outputs
from qat.stopping import explained_failures

RECORDED = ("torch", "numpy", "pytorch-quantization", "mmcv-full", "mmdet3d", "spconv", "spconv-cu126")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before the long part of the run, files that can't be written at its end.

    Raises:
        QuantizationError: see `lean.files.check_writable`; or the package that writes one of them is missing.
    """
    for path in outputs(args.save):
        check_writable(path, "--save")
    need_safetensors()
    if args.stats:
        check_writable(args.stats, "--stats")
    if args.save_recipe:
        check_writable(args.save_recipe, "--save-recipe")


def find_frames(cfg: Mapping[str, Any], args: argparse.Namespace, seed: int) -> Frames | None:
    """Choose the frames to run over, and say how many there are; None with `--from-stats`.

    Raises:
        InputError: the data can't be used.
    """
    if args.from_stats:
        print(f"statistics: {args.from_stats}")
        return None
    frames = choose_frames(cfg, args.calib_pipeline, args.calibrate_batch, seed, args.on_bad_frame == "skip")
    print(frames.describe())
    return frames


def choose_workers(args: argparse.Namespace, device: torch.device) -> int:
    """Data loading processes of each process of the run: as asked, else an equal share of what the machine bears."""
    workers = common.choose_workers(args.workers, device)
    return workers if args.workers is not None else max(workers // local_world(), 1)


def load_float_model(cfg: Mapping[str, Any], args: argparse.Namespace) -> tuple[nn.Module, str]:
    """Build the float model of the config and load its checkpoint, in evaluation mode on the CPU.

    Returns the model, and the checkpoint's SHA-256.

    Raises:
        InputError: the config or the checkpoint can't be used.
        UsageError: the checkpoint is that of a quantised model.
    """
    if Path(args.ckpt).is_file() and holds_checked(Path(args.ckpt)):
        raise common.UsageError(f"--ckpt {args.ckpt}: is quantised already; name the float checkpoint")
    model = build_model(cfg["model"])
    report = load_checkpoint(model, args.ckpt, allow_partial=args.allow_partial, trust_pickle=args.trust_pickle)
    if not report.complete:
        print(f"{args.ckpt} fits the model in part only; what it lacks stayed random: {report}")
    return model, report.sha256


def check_disable(model: nn.Module, recipe: Recipe, patterns: Sequence[str]) -> None:
    """Refuse, before the long part of the run, what `disable` would refuse after it.

    Raises:
        QuantizationError: see `lean.switches.disable_layers`.
    """
    with disabled(model, recipe, patterns):
        pass


@contextmanager
def disabled(model: nn.Module, recipe: Recipe, patterns: Sequence[str] = ()) -> Iterator[None]:
    """Do for the length of a `with` block what `disable` does for good; no other layer is disabled."""
    with quantizer_flags(named_quantizers(model).values(), _disabled=False):
        disable(model, recipe, patterns)
        yield


def made_of(
    args: argparse.Namespace, cfg: Mapping[str, Any], recipe: Recipe, frames: Frames | None, checkpoint: str
) -> dict[str, Any]:
    """What statistics depend on: if one of it differs they are of no use; no frames: what choosing amax depends on.

    checkpoint: its SHA-256.
    """
    found = {"model": dict(cfg["model"]), "checkpoint": checkpoint, "recipe": _observed(recipe)}
    if frames is not None:
        found |= {"pipeline": args.calib_pipeline, "seed": frames.seed, "frames": list(frames.tokens)}
        found |= {"config": {key: value for key, value in cfg.items() if key != "model"}}
    return found


def _observed(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe statistics depend on: all but how amax is chosen from them, and what is disabled then."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("methods", "disable")}


def calibrate(
    model: nn.Module,
    frames: Frames | None,
    made: Mapping[str, Any],
    method: Method,
    args: argparse.Namespace,
    workers: int,
) -> Statistics | None:
    """Collect statistics, or read them from `--from-stats`, and set every amax; None with the stock calibrator.

    Of several processes only the first sets amax.

    Raises:
        InputError: a frame can't be read.
        QuantizationError: NaN in the data, a quantizer is left without a finite, positive amax, or a file of
            statistics is of no use here.
    """
    if args.calibrator == "stock":
        _calibrate_stock(model, frames, method, args, workers)
        return None
    if args.from_stats:
        statistics = Statistics.load(args.from_stats)
        statistics.refuse_other(made, f"--from-stats {args.from_stats}")
    else:
        options = {"resume": args.resume, "save_every": args.save_every, "workers": workers}
        statistics = collect(model, frames, made, partial_file(args.save), **options)
    if rank() == 0:
        if args.stats:
            statistics.save(args.stats)
        calibrate_weights(model, args.weight_method)
        set_amax(model, statistics.histograms, method, percentile=args.percentile)
        check_calibrated(model)
    return statistics


def _calibrate_stock(model: nn.Module, frames: Frames, method: Method, args: argparse.Namespace, workers: int) -> None:
    device = model_device(model)
    loader = calibration_loader(frames.dataset, frames.indices, batch_size=1, workers=workers, seed=frames.seed)
    set_quantizer_fast(model)
    with explained_failures(lambda: "calibration", device):
        calibrate_model(
            model,
            loader,
            device,
            forward_of(model),
            len(frames.indices),
            method=method,
            calibrator="stock",
            weight_method=args.weight_method,
            progress=lambda batches, total: tqdm(batches, "calibrate", total, unit="frame", smoothing=0.1),
            percentile=args.percentile,
        )


def disable(model: nn.Module, recipe: Recipe, patterns: Sequence[str]) -> None:
    """Leave the recipe's sensitive layers and those that fit `patterns` in floating point."""
    disable_layers(model, recipe.disable, "the recipe's disable pattern")
    disable_layers(model, patterns, "--disable")


def provenance(
    args: argparse.Namespace, cfg: Mapping[str, Any], recipe: Recipe, method: Method, made: Mapping[str, Any]
) -> dict[str, Any]:
    """What the quantised model was made of and how, in plain types; `made`: see `made_of`, with frames."""
    tokens = list(made["frames"])
    return {
        "config": dict(cfg),
        "checkpoint": {"file": str(args.ckpt), "sha256": made["checkpoint"]},
        "recipe": recipe.to_dict(),
        "disable": list(args.disable),
        "method": method,
        "percentile": args.percentile,
        "weight_method": args.weight_method,
        "calibrator": args.calibrator,
        "calibration": {
            "pipeline": made["pipeline"],
            "seed": made["seed"],
            "tokens": tokens,
            "sha256": hashlib.sha256("\n".join(tokens).encode()).hexdigest(),
            "replaced": dict(made.get("replaced", {})),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {"python": platform.python_version(), **{name: found[name] for name in RECORDED if name in found}}
