"""Setting the amax of a model's input quantizers from what they have seen."""

import math
from collections.abc import Iterable, Mapping

import torch
from pytorch_quantization.calib import MaxCalibrator
from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from lean.amax import METHODS, choose_amax
from lean.calibrate import input_quantizers, model_device, name_some
from lean.errors import QuantizationError
from lean.histogram import Histogram
from lean.matching import matches

Method = str | Mapping[str, str]


def set_amax(model: nn.Module, statistics: Mapping[str, Histogram], method: Method = "mse", **options: float) -> None:
    """Set every enabled input quantizer's amax from its statistics, by `lean.amax.choose_amax`.

    Args:
        statistics: by quantizer name, as `Observers.statistics` gives them.
        method: `mse`, `entropy`, `percentile` or `max`, or one of them for each of several globs over quantizer names,
            of which the last fitting one counts.
        options: further arguments of `choose_amax`, such as `percentile`.

    Raises:
        QuantizationError: the statistics are those of another model, a quantizer saw no data, NaN or infinity, its
            amax is not positive, or no glob fits it.
    """
    quantizers = input_quantizers(model)
    _refuse_other_names(statistics, quantizers)
    empty = [
        name for name in quantizers if statistics[name].max_abs == 0 and not any(statistics[name].nonfinite.values())
    ]
    _refuse_unseen(empty)
    groups: dict[tuple, list[str]] = {}
    for name, chosen in methods_of(quantizers, method).items():
        groups.setdefault((chosen, quantizers[name].num_bits, quantizers[name].unsigned), []).append(name)
    amax: dict[str, float] = {}
    for (chosen, num_bits, unsigned), names in groups.items():
        part = {name: statistics[name] for name in names}
        amax |= choose_amax(part, chosen, num_bits=num_bits, unsigned=unsigned, **options)
    _store(quantizers, amax, model_device(model))


def set_stock_amax(model: nn.Module, method: Method = "mse", **options: float) -> None:
    """Set every enabled input quantizer's amax from its own calibrator, the library's.

    Args:
        method, options: see `set_amax`; options are those of the calibrator's `compute_amax`.

    Raises:
        QuantizationError: a quantizer saw no data, its amax is not finite and positive, or no glob fits it.
    """
    quantizers = input_quantizers(model)
    found = {}
    for name, chosen in methods_of(quantizers, method).items():
        calibrator = quantizers[name]._calibrator
        keeps_max = isinstance(calibrator, MaxCalibrator)
        found[name] = calibrator.compute_amax() if keeps_max else calibrator.compute_amax(chosen, **options)
    _refuse_unseen([name for name, amax in found.items() if amax is None])
    _store(quantizers, {name: amax.item() for name, amax in found.items()}, model_device(model))


def methods_of(quantizers: Mapping[str, TensorQuantizer], method: Method) -> dict[str, str]:
    """The method of each quantizer; one with a max calibrator takes the maximum, as the recipe says.

    Raises:
        QuantizationError: a method is unknown, or no glob fits a quantizer.
    """
    rules = {"*": method} if isinstance(method, str) else method
    for chosen in rules.values():
        if chosen not in METHODS:
            raise QuantizationError(f"calibration method must be one of {', '.join(METHODS)}, got {chosen!r}")
    found = {}
    for name, quantizer in quantizers.items():
        fitting = [chosen for pattern, chosen in rules.items() if matches(name, [pattern])]
        if not fitting:
            raise QuantizationError(f"no calibration method is given for {name}: add a pattern that fits it")
        found[name] = "max" if isinstance(quantizer._calibrator, MaxCalibrator) else fitting[-1]
    return found


def _refuse_other_names(statistics: Iterable[str], quantizers: Iterable[str]) -> None:
    unequal = sorted(set(statistics) ^ set(quantizers))
    if unequal:
        side = "statistics" if unequal[0] in statistics else "model"
        raise QuantizationError(
            f"the statistics don't fit the model: quantizer {unequal[0]} is only in the {side} ({len(unequal)} "
            "differ); use the config and recipe they were made with"
        )


def _refuse_unseen(names: list[str]) -> None:
    if names:
        raise QuantizationError(
            f"no data, or only zeros, reached {name_some(names)}; check the data or disable the layer"
        )


def _store(quantizers: Mapping[str, TensorQuantizer], amax: Mapping[str, float], device: torch.device) -> None:
    bad = [f"{name} ({value:g})" for name, value in amax.items() if not (math.isfinite(value) and value > 0)]
    if bad:
        raise QuantizationError(f"amax is not finite and positive: {name_some(bad)}; check the data or the percentile")
    for name, value in amax.items():
        quantizers[name].set_amax(torch.tensor(value, dtype=torch.float32, device=device))
