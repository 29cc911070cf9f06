"""A calibrated model to measure, from a float checkpoint or from what `qat/ptq.py` wrote."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from nuscenes import NuScenes
from torch import nn

from bevfusion.data import NuScenesDataset
from bevfusion.errors import InputError
from bevfusion.nuscenes_tables import open_nuscenes
from lean.calibrate import check_calibrated
from lean.files import digest
from lean.fold import fold_dense, fold_sparse
from lean.matching import select
from lean.switches import quantized_layers
from qat import calibration, common
from qat.collection import partial_file
from qat.frames import choose_frames
from qat.inference import evaluation_dataset, holds_whole_model, load_model, spread
from qat.recipes import insert_by_recipe

CALIBRATING = ("stats", "recipe", "disable", "method")  # options of no use to a model that is quantised already


class Prepared(NamedTuple):
    """A calibrated model, and what it was made of, in plain types."""

    model: nn.Module
    made_of: dict[str, Any]


def find_frames(cfg: Mapping[str, Any], split: str, count: int) -> tuple[NuScenesDataset, list[int]]:
    """The frames of a split through the test pipeline, and the indices of `count` of them, evenly spread.

    Raises:
        InputError: the data can't be used, or there are no frames.
    """
    dataset = evaluation_dataset(cfg, split)
    indices = spread(len(dataset), count)
    if len(indices) < count:
        print(f"measuring on all {len(indices)} frames of {dataset.ann_file}; {count} were asked for")
    return dataset, indices


def open_tables(dataset: NuScenesDataset, indices: Sequence[int]) -> NuScenes:
    """The tables that the official metrics take the annotations of the frames from.

    Raises:
        InputError: a frame has no annotations, or the tables can't be used.
    """
    bare = [frame.token for index in indices if (frame := dataset.data_infos[index]).ground_truth is None]
    if bare or not dataset.version:
        lacking = f"annotations of frame {bare[0]}" if bare else "the name of its nuScenes version"
        raise InputError(
            f"the official metrics need ground truth: {dataset.ann_file} lacks {lacking}; use --metric drift"
        )
    return open_nuscenes(dataset.dataset_root, dataset.version)


def quantised_model(cfg: Mapping[str, Any], args: argparse.Namespace, device: torch.device, seed: int) -> Prepared:
    """Load `args.ckpt`, and quantise it as `qat/ptq.py` would if it is float.

    Calibration is kept beside `args.out`, or in `args.stats`, from which it is read if that file exists.

    Raises:
        InputError: checkpoint or data can't be used.
        QuantizationError: recipe, statistics or a pattern don't fit the model.
        UsageError: options for calibration with a quantised model.
    """
    return _saved(cfg, args, device) if holds_whole_model(args.ckpt) else _calibrated(cfg, args, device, seed)


def _saved(cfg: Mapping[str, Any], args: argparse.Namespace, device: torch.device) -> Prepared:
    given = [f"--{name}" for name in CALIBRATING if getattr(args, name)]
    if given:
        raise common.UsageError(f"{args.ckpt} is quantised already: leave out {given[0]}, or name the float checkpoint")
    model = load_model(cfg, args.ckpt, device)
    if not quantized_layers(model):
        raise InputError(f"{args.ckpt} holds a whole float model: give a checkpoint of its weights instead")
    check_calibrated(model)
    select(args.only, quantized_layers(model), "--only")
    return Prepared(model, {"checkpoint": digest(args.ckpt)})


def _calibrated(cfg: Mapping[str, Any], args: argparse.Namespace, device: torch.device, seed: int) -> Prepared:
    known = args.stats is not None and args.stats.exists()
    stats = {"stats": None, "from_stats": args.stats} if known else {"stats": args.stats, "from_stats": None}
    options = argparse.Namespace(**{**vars(args), **stats, "save": args.out})
    model, checkpoint = calibration.load_float_model(cfg, args)
    frames = None if known else choose_frames(cfg, args.calib_pipeline, args.calibrate_batch, seed)
    print(frames.describe() if frames else f"statistics: {args.stats}")
    recipe, _ = insert_by_recipe(model, options)
    select(args.only, quantized_layers(model), "--only")
    fold_sparse(model)
    fold_dense(model)
    model.to(device)
    made = calibration.made_of(args, cfg, recipe, frames, checkpoint)
    method, workers = args.method or recipe.method_table(), calibration.choose_workers(args, device)
    statistics = calibration.calibrate(model, frames, made, method, options, workers)
    if args.stats is None:
        statistics.save(partial_file(args.out))  # with --resume an interrupted run need not calibrate again
    calibration.disable(model, recipe, args.disable)
    made = calibration.provenance(options, cfg, recipe, method, statistics.made_of)
    return Prepared(model, {**made, "checkpoint": made["checkpoint"]["sha256"]})
