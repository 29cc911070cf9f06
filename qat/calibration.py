"""The steps of `qat/ptq.py`: from a float checkpoint and training frames to a saved quantised model."""

import argparse
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mmcv.parallel import MMDataParallel
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from bevfusion.checkpoint import load_checkpoint
from bevfusion.data import (
    build_dataset,
    calibration_dataset,
    calibration_frames,
    calibration_loader,
    frames_of,
    to_device,
)
from bevfusion.errors import InputError
from bevfusion.models import build_model
from lean.calibrate import reset_statistics
from lean.files import atomic_write
from lean.matching import matches
from lean.quantize import calibrate_model, set_quantizer_fast
from lean.recipe import Recipe
from lean.status import layer_status
from lean.switches import disable_layers, named_quantizers, quantizer_flags
from qat import common

RECORDED = ("torch", "numpy", "pytorch-quantization", "mmcv-full", "mmdet3d", "spconv", "spconv-cu126")


@dataclass(frozen=True)
class Frames:
    """The frames that calibration runs over.

    Attributes:
        asked: how many were asked for.
        indices: into `frames_of(dataset)`, in the order of the run.
        tokens: sample tokens, in the same order.
        available, samples, validation: distinct training frames, training samples (a wrapper may repeat frames),
            and validation frames, None where the config's validation info file is missing.
    """

    dataset: Dataset
    seed: int
    asked: int
    indices: tuple[int, ...]
    tokens: tuple[str, ...]
    available: int
    samples: int
    validation: int | None

    def describe(self) -> str:
        """Numbers of training and validation samples, and of the frames chosen."""
        validation = "no info file" if self.validation is None else str(self.validation)
        lines = [f"training frames: {self.available} (samples: {self.samples}), validation frames: {validation}"]
        if len(self.indices) < self.asked:
            lines.append(f"calibrating on all {len(self.indices)} frames there are; {self.asked} were asked for")
        return "\n".join(lines)


def load_float_model(cfg: Mapping[str, Any], args: argparse.Namespace) -> nn.Module:
    """Build the float model of the config and load its checkpoint, in evaluation mode on the CPU.

    Raises:
        InputError: the config or the checkpoint can't be used.
    """
    model = build_model(cfg["model"])
    report = load_checkpoint(model, args.ckpt, allow_partial=args.allow_partial, trust_pickle=args.trust_pickle)
    if not report.complete:
        print(f"{args.ckpt} fits the model in part only; what it lacks stayed random: {report}")
    return model


def choose_frames(cfg: Mapping[str, Any], pipeline: str, count: int, seed: int) -> Frames:
    """Open the training data and choose `count` frames, spread over all scenes, by the seed alone.

    Raises:
        InputError: the data can't be used.
    """
    dataset = calibration_dataset(cfg, pipeline)
    infos = frames_of(dataset).data_infos
    indices = tuple(calibration_frames(dataset, count, seed))
    if not indices:
        raise InputError(f"{cfg['data']['train'].get('ann_file', 'the training info file')} holds no frames")
    return Frames(
        dataset=dataset,
        seed=seed,
        asked=count,
        indices=indices,
        tokens=tuple(infos[index].token for index in indices),
        available=len(infos),
        samples=len(dataset),
        validation=_count_validation(cfg),
    )


def _count_validation(cfg: Mapping[str, Any]) -> int | None:
    config = cfg["data"]["val"]
    return len(frames_of(build_dataset(config))) if Path(config["ann_file"]).exists() else None


def check_disable(model: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse, before the long part of the run, patterns that fit nothing or split a group with one scale.

    Raises:
        QuantizationError: see `lean.switches.disable_layers`.
    """
    with quantizer_flags(named_quantizers(model).values(), _disabled=False):
        disable_layers(model, patterns, "--disable")


def calibrate(model: nn.Module, frames: Frames, args: argparse.Namespace, workers: int) -> None:
    """Run the frames through `model` and set every amax; shows a progress bar.

    Raises:
        InputError: a frame can't be read.
        QuantizationError: NaN in the data, or a quantizer is left without a finite, positive amax.
    """
    device = next(model.parameters()).device
    loader = calibration_loader(frames.dataset, frames.indices, batch_size=1, workers=workers, seed=frames.seed)
    set_quantizer_fast(model)

    def progress(batches, total):
        return tqdm(batches, "calibrate", total, unit="frame", smoothing=0.1)

    calibrate_model(
        model,
        loader,
        device,
        lambda net, batch: net(**to_device(batch, device)),
        len(frames.indices),
        method=args.method,
        calibrator=args.calibrator,
        weight_method=args.weight_method,
        name_of=lambda number, batch: f"frame {frames.tokens[number - 1]}",
        progress=progress,
        percentile=args.percentile,
    )


def disable(model: nn.Module, recipe: Recipe, patterns: Sequence[str]) -> None:
    """Leave the recipe's sensitive layers and those that fit `patterns` in floating point."""
    disable_layers(model, recipe.disable, "the recipe's disable pattern")
    disable_layers(model, patterns, "--disable")


def provenance(args: argparse.Namespace, cfg: Mapping[str, Any], recipe: Recipe, frames: Frames) -> dict[str, Any]:
    """What the quantised model was made of and how, in plain types."""
    with Path(args.ckpt).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    versions = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {
        "config": dict(cfg),
        "checkpoint": {"file": str(args.ckpt), "sha256": digest},
        "recipe": recipe.to_dict(),
        "disable": list(args.disable),
        "method": args.method,
        "percentile": args.percentile,
        "weight_method": args.weight_method,
        "calibrator": args.calibrator,
        "calibration": {"pipeline": args.calib_pipeline, "seed": frames.seed, "tokens": list(frames.tokens)},
        "versions": {"python": platform.python_version(), **{n: versions[n] for n in RECORDED if n in versions}},
    }


def save(model: nn.Module, path: Path, made_of: Mapping[str, Any]) -> None:
    """Write the whole quantised model, wrapped in `MMDataParallel` as exporters expect it, or nothing at all.

    `torch.load(path, weights_only=False).module` gives the model back, with `made_of` as its attribute `ptq`.

    Raises:
        QuantizationError: the file can't be written; an older one is as it was.
    """
    model.ptq = dict(made_of)
    reset_statistics(model)
    device = next(model.parameters()).device
    wrapped = MMDataParallel(model, device_ids=[device.index or 0] if device.type == "cuda" else [])
    with atomic_write(path) as file:
        torch.save(wrapped, file)


def branch_table(model: nn.Module, recipe: Recipe) -> str:
    """Lay out per branch how many layers are quantised and disabled, and the range of their amax."""
    rows = []
    for branch in recipe.branches:
        layers = [layer for layer in layer_status(model) if matches(layer.name, [branch.path, f"{branch.path}.*"])]
        active = [layer for layer in layers if not layer.disabled]
        inputs = [layer.input_amax for layer in active]
        weights = [bound for layer in active if layer.weight_amax for bound in layer.weight_amax]
        disabled = ", ".join(layer.name.removeprefix(f"{branch.path}.") for layer in layers if layer.disabled)
        rows.append((branch.path, len(active), disabled or "-", _range(inputs), _range(weights)))
    headers = ("branch", "int8 layers", "left float", "input amax", "weight amax")
    return common.format_table(headers, rows, right=("int8 layers",))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}" if values else "-"
