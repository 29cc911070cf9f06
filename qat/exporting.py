"""What the export scripts share: their options, loading the model, and reporting what was written."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bevfusion.checkpoint import extract_state_dict, load_checkpoint, read_file
from bevfusion.errors import InputError
from bevfusion.models import build_model
from lean.export.checks import check_exportable
from lean.export.dense import DenseOptions, Written
from lean.export.folder import all_or_none
from lean.export.lint import WEIGHT_AXIS
from lean.fold import fold_dense
from qat import arguments, common, tables
from qat.inference import holds_whole_model, load_model

FOR_FP16 = ("camera.vtransform.onnx", "head.bbox.onnx")  # not quantised, whatever the recipe: no need to list why

Writer = Callable[[nn.Module, Path, DenseOptions], list[Written]]


def load_for_export(args: argparse.Namespace) -> nn.Module:
    """Load the model of `args.ckpt` on the CPU, and make sure that it can be exported.

    A saved quantised model brings its config along; a float checkpoint (`args.fp16`) needs `args.config`.

    Raises:
        InputError: the file can't be used, or does not fit the config.
        QuantizationError: the model can't be exported.
    """
    if holds_whole_model(args.ckpt):
        model = load_model({}, args.ckpt, torch.device("cpu"))
        if args.config or args.cfg_options:
            _check_config(model, args)
    else:
        model = _float_model(args)
    check_exportable(model, args.fp16)
    fold_dense(model)
    return model.eval()


def _float_model(args: argparse.Namespace) -> nn.Module:
    state = extract_state_dict(read_file(args.ckpt), args.ckpt)
    if any(name.endswith("_amax") for name in state):
        raise InputError(
            f"{args.ckpt} holds the state dict of a quantised model: export needs the whole model that qat/ptq.py saves"
        )
    if not args.fp16:
        raise InputError(
            f"{args.ckpt} is a float checkpoint, not quantised: run qat/ptq.py --ckpt {args.ckpt} and export what it "
            "saves, or export the float model with --fp16"
        )
    args.config = args.config or arguments.DEFAULT_CONFIG
    model = build_model(common.load_config(args)["model"])
    load_checkpoint(model, args.ckpt)
    return model


def _check_config(model: nn.Module, args: argparse.Namespace) -> None:
    """Refuse a config whose model is not the one that was quantised."""
    args.config = args.config or arguments.DEFAULT_CONFIG
    wanted, own = common.load_config(args)["model"], getattr(model, "ptq", {}).get("config", {}).get("model")
    if own is not None and (key := first_difference(own, wanted, "model")):
        raise InputError(f"{args.ckpt} was made of another config than {args.config}: they differ in {key}")


def first_difference(a: Any, b: Any, where: str) -> str | None:
    """The dotted key at which two nested configs differ first, None if they are equal."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {**a, **b}:
            if key not in a or key not in b:
                return f"{where}.{key}"
            if found := first_difference(a[key], b[key], f"{where}.{key}"):
                return found
        return None
    sequences = all(isinstance(value, Sequence) and not isinstance(value, str) for value in (a, b))
    return None if (list(a) == list(b) if sequences else a == b) else where


def example_voxels(model: nn.Module) -> tuple[Tensor, Tensor]:
    """One voxel in the middle of the grid: features (1, C) and coordinates (1, 4) of (batch, x, y, z)."""
    backbone = model.encoders["lidar"]["backbone"]
    channels = next(m.in_channels for m in backbone.modules() if hasattr(m, "in_channels"))
    middle = [size // 2 for size in backbone.sparse_shape]
    return torch.ones(1, channels), torch.tensor([[0, *middle]], dtype=torch.int32)


def dense_options(args: argparse.Namespace) -> DenseOptions:
    """The options of the dense files."""
    return DenseOptions(args.typing, args.fp16, getattr(args, "layernorm_plugin", False))


def output_folder(args: argparse.Namespace) -> Path:
    """Where the files go: `args.out`, or the default folder of the precision."""
    return args.out or Path("qat") / ("onnx_fp16" if args.fp16 else "onnx_int8")


def write_all(model: nn.Module, args: argparse.Namespace, writers: Sequence[Writer]) -> None:
    """Let the writers write their files into the output folder, all of them or none, and print what was written.

    Raises:
        QuantizationError: a part can't be exported, or the folder can't be written.
    """
    folder, options = output_folder(args), dense_options(args)
    with all_or_none(folder) as staging:
        written = [part for writer in writers for part in writer(model, staging, options)]
        files = sorted((path.name, path.stat().st_size) for path in staging.iterdir())
    print(report(written, files, options))
    print(f"wrote {len(files)} files to {folder}")


def report(written: Sequence[Written], files: Sequence[tuple[str, int]], options: DenseOptions) -> str:
    """Table of the files, and below it what runs in another precision than one may expect, and why."""
    parts = {part.path.name: part for part in written}
    rows, notes = [], []
    for name, size in files:
        part = parts.get(name)
        layers = [finding for finding in part.findings if finding.kind in WEIGHT_AXIS] if part else []
        int8 = sum(finding.why_float is None for finding in layers)
        rows.append((name, f"{size / 2**20:.1f}", int8 if part else "-", len(layers) - int8 if part else "-"))
        if part and not options.fp16 and name not in FOR_FP16:
            notes += [f"{name}: {finding}" for finding in part.findings if finding.why_float]
        notes += [f"{name}: {line}" for line in part.half.lines()] if part else []
    headers = ("file", "MiB", "int8 layers", "float layers")
    return "\n".join([tables.format_table(headers, rows, right=headers[1:]), *notes])


def check_folder(args: argparse.Namespace) -> None:
    """Make sure, before anything long is done, that the output folder can be written to.

    Raises:
        QuantizationError: it can't.
    """
    folder = output_folder(args)
    existed = folder.exists()
    with all_or_none(folder):
        pass
    if not existed:  # a failing export leaves no trace
        folder.rmdir()
