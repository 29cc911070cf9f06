"""The optional improvements of a calibrated model: adaptive rounding and bias correction, on calibration frames."""

import argparse
import logging

from torch import nn

from bevfusion.data import calibration_loader, to_device
from lean.adaround import can_round, round_weights
from lean.bias_correction import correct_biases
from lean.calibrate import model_device
from lean.sqnr import measure_noise
from lean.switches import quantized_layers
from qat.frames import Frames

logger = logging.getLogger("qat")

FRAMES = 8
RANKING_FRAMES = 2  # of them


def improve(model: nn.Module, frames: Frames | None, args: argparse.Namespace) -> dict[str, list[str]]:
    """Do what `--adaround` and `--bias-correction` ask for, in place, and return the layers of each.

    Call it when it is settled which layers are in INT8: both change the parameters of these alone. Turning quantisation
    off afterwards no longer gives the float model back.

    Raises:
        InputError: a frame can't be read.
    """
    done: dict[str, list[str]] = {}
    if args.adaround:
        worst = worst_layers(model, frames, args.adaround)
        errors = round_weights(model, worst, _batches(model, frames, FRAMES), run)
        for name, (before, after) in errors.items():
            logger.info("%s: error of its output %.3g -> %.3g of its power", name, before, after)
        done["adaround"] = worst
    if args.bias_correction:
        (batch,) = _batches(model, frames, FRAMES, together=True)
        shifts = correct_biases(model, lambda: run(model, batch))
        done["bias_correction"] = list(shifts)
    return done


def worst_layers(model: nn.Module, frames: Frames, count: int) -> list[str]:
    """Names of the `count` layers whose rounded weights disturb their output most, of those that can be rounded."""
    names = [name for name, layer in quantized_layers(model).items() if can_round(layer)]
    measured = measure_noise(model, _batches(model, frames, RANKING_FRAMES), run, parts=("weights",), layers=names)
    noise = measured.layers["weights"]
    return sorted(noise, key=lambda name: noise[name].sqnr_db)[:count]


def run(model: nn.Module, batch: dict) -> list[dict]:
    """Run a batch that lies on the model's device."""
    return model(**batch)


def _batches(model: nn.Module, frames: Frames, count: int, together: bool = False):
    """The first calibration frames, one by one or as one batch, on the model's device."""
    indices, device = frames.indices[:count], model_device(model)
    size = len(indices) if together else 1
    for batch in calibration_loader(frames.dataset, indices, batch_size=size, seed=frames.seed):
        yield to_device(batch, device)
