"""The names that users' scripts call; the work is done by the modules they come from."""

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_quantization.calib import HistogramCalibrator
from torch import nn

from lean.bevfusion_recipe import DECODER_BRANCH, LIDAR_BRANCH, camera_branch_of
from lean.calibrate import (
    calibrate_weights,
    check_calibrated,
    input_quantizers,
    model_device,
    observe,
    observing,
    reset_statistics,
    run_detector,
)
from lean.errors import QuantizationError
from lean.insert import Inserted, insert_branch
from lean.observer import FiniteCheck
from lean.ranges import Method, methods_of, set_amax, set_stock_amax
from lean.recipe import BranchRecipe, LayerRule
from lean.status import quantizer_table
from lean.switches import disable_layers, disable_quantization, enable_quantization, named_quantizers

__all__ = [
    "calibrate_model",
    "disable_layers",
    "disable_quantization",
    "enable_quantization",
    "initialize",
    "print_quantizer_status",
    "quantize_decoder",
    "quantize_encoders_camera_branch",
    "quantize_encoders_lidar_branch",
    "replace_to_quantization_module",
    "set_quantizer_fast",
]


def initialize() -> None:
    """Silence pytorch-quantization's log, which has several lines for every quantizer; torch stays unpatched."""
    # Its own logger alone: absl's `set_verbosity` would silence the root logger, and with it ours.
    logging.getLogger("absl").setLevel(logging.ERROR)


def quantize_encoders_lidar_branch(backbone: nn.Module) -> Inserted:
    """Quantise the sparse convolutions and residual adds of the LiDAR backbone, in place."""
    return insert_branch(backbone, LIDAR_BRANCH)


def quantize_encoders_camera_branch(camera: nn.Module) -> Inserted:
    """Quantise backbone, neck and depth net of the camera branch, in place; share scales where it pays."""
    return insert_branch(camera, camera_branch_of(camera))


def replace_to_quantization_module(module: nn.Module) -> Inserted:
    """Quantise every layer below `module` that has a quantised form, in place."""
    return insert_branch(module, BranchRecipe(type(module).__name__, (LayerRule("*"),)))


def quantize_decoder(decoder: nn.Module) -> Inserted:
    """Quantise every convolution of the BEV decoder (backbone and neck), in place."""
    return insert_branch(decoder, DECODER_BRANCH)


def set_quantizer_fast(model: nn.Module) -> None:
    """Let the library's calibrators count where the tensor lies, instead of in numpy on the CPU; ours always do."""
    for quantizer in named_quantizers(model).values():
        if isinstance(quantizer._calibrator, HistogramCalibrator):
            quantizer._calibrator._torch_hist = True


def calibrate_model(
    model: nn.Module,
    dataloader: Iterable,
    device: torch.device | str | int,
    batch_processor_callback: Callable[[nn.Module, Any], Any] | None = None,
    num_batch: int = 1,
    *,
    method: Method = "mse",
    calibrator: str = "lean",
    weight_method: str = "max",
    name_of: Callable[[int, Any], str] = lambda number, batch: f"batch {number}",
    progress: Callable[..., Iterable] | None = None,
    **options: float,
) -> int:
    """Run `num_batch` batches through `model` and set every amax from what its quantizers saw.

    Args:
        dataloader: yields batches; if it has fewer than `num_batch`, all of them run and a warning is logged.
        device: the model's device.
        batch_processor_callback: called with (model, batch); by default the batch is passed to an mmdet3d detector.
        method: `mse`, `entropy`, `percentile` or `max`, or one of them for each of several globs over quantizer names.
        calibrator: `lean` counts exactly (`lean.histogram`), summed over the processes of torch.distributed; `stock` is
            the library's own, for comparison.
        weight_method: `max` or `mse`.
        name_of: what to call a batch, given its number from 1 and itself, in an error about its data.
        progress: wraps the iteration over batches like `tqdm(iterable, total=n)`.
        options: further arguments of the choice of amax, such as `percentile`.

    Returns:
        The number of batches that ran.

    Raises:
        QuantizationError: no batch, a device that isn't the model's, NaN or infinity in the data, or a quantizer that
            is left without a finite, positive amax.
    """
    _check_device(model, device)
    methods_of(input_quantizers(model), method)  # refuses what it can't use before the long part of the run
    calibrate_weights(model, weight_method)
    forward = batch_processor_callback or run_detector
    if calibrator == "lean":
        with observing(model) as observers:
            finite = FiniteCheck(observers)

            def check(number: int, batch: Any) -> None:
                finite.after(name_of(number, batch))

            done = observe(model, dataloader, num_batch, forward, progress, check)
            finite.finish()
        set_amax(model, observers.statistics(summed=True), method, **options)
    elif calibrator == "stock":
        reset_statistics(model)
        done = observe(model, dataloader, num_batch, forward, progress)
        set_stock_amax(model, method, **options)
    else:
        raise QuantizationError(f"unknown calibrator {calibrator!r}: choose lean or stock")
    check_calibrated(model)
    return done


def print_quantizer_status(model: nn.Module) -> None:
    """Write a table of all quantised layers to standard output."""
    sys.stdout.write(quantizer_table(model) + "\n")


def _check_device(model: nn.Module, device: torch.device | str | int) -> None:
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    actual = model_device(model)
    if wanted.type != actual.type or wanted.index not in (None, actual.index):
        raise QuantizationError(f"calibration on {wanted} was asked for, but the model is on {actual}; move it there")
