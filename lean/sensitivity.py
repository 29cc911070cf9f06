"""What each quantised layer costs: the network with it alone quantised, and with everything but it quantised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from lean.calibrate import check_calibrated
from lean.errors import QuantizationError
from lean.matching import select
from lean.replay import Tape, replaying
from lean.sharing import sharing_groups
from lean.sqnr import Noise, noise_between, output_module
from lean.switches import named_quantizers, quantized_layers, quantizer_flags, unwrap

PARTS = ("both", "inputs", "weights")
FLOAT, INT8, ALONE, WITHOUT = "float", "int8", "alone", "without"


@dataclass(frozen=True)
class Unit:
    """Layers that are quantised together, because they have one input scale; named after the first of them.

    Attributes:
        left_float: whether the recipe leaves them in float: they are tried alone only.
    """

    name: str
    layers: tuple[str, ...]
    left_float: bool = False


@dataclass(frozen=True)
class Trial:
    """A way to run the network.

    Attributes:
        kind: `float`; `int8` (as the model is); `alone` (the unit alone quantised); `without` (`int8` but the unit).
        unit: name of a unit for the last two.
    """

    kind: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.unit}" if self.unit else self.kind


@dataclass(frozen=True)
class Outcome:
    """What came of one trial on one frame.

    Attributes:
        noise: for each output, what differs from the float network.
        result: what the network returned.
    """

    trial: Trial
    noise: Mapping[str, Noise]
    result: Any


def sensitivity_units(
    model: nn.Module, only: Iterable[str] = ("*",), part: str = "both", what: str = "--only"
) -> list[Unit]:
    """The units with a layer that fits one of the globs `only` and with quantizers of `part`, in module order.

    Raises:
        QuantizationError: a glob fits no quantised layer, the model has none, or the part is unknown.
    """
    layers = quantized_layers(model)
    if not layers:
        raise QuantizationError("the model has no quantised layers: insert quantizers first")
    chosen = set(select(only, layers, what))
    groups = {name: tuple(group) for group in sharing_groups(unwrap(model)) for name in group}
    found = dict.fromkeys(groups.get(name, (name,)) for name in layers)
    units = [Unit(group[0], group, all(layers[name].is_disabled for name in group)) for group in found]
    own = unit_quantizers(model, units, part)
    return [unit for unit in units if chosen.intersection(unit.layers) and own[unit.name]]


def plan_trials(units: Iterable[Unit]) -> list[Trial]:
    """The trials of a frame, in the order that they run in."""
    units = list(units)
    alone = [Trial(ALONE, unit.name) for unit in units]
    without = [Trial(WITHOUT, unit.name) for unit in units if not unit.left_float]
    return [Trial(FLOAT), *alone, Trial(INT8), *without]


def unit_quantizers(model: nn.Module, units: Iterable[Unit], part: str = "both") -> dict[str, list[TensorQuantizer]]:
    """The quantizers of each unit that belong to a part of its layers: `both`, their `inputs` or their `weights`.

    Raises:
        QuantizationError: the part is unknown.
    """
    if part not in PARTS:
        raise QuantizationError(f"unknown part {part!r}: choose from {', '.join(PARTS)}")
    layers, found = quantized_layers(model), {}
    for unit in units:
        kinds = [("inputs", layers[name]._input_quantizer) for name in unit.layers]
        kinds += [("weights", getattr(layers[name], "_weight_quantizer", None)) for name in unit.layers]
        chosen = [quantizer for kind, quantizer in kinds if part in ("both", kind) and quantizer is not None]
        found[unit.name] = list(dict.fromkeys(chosen))
    return found


def run_trials(
    model: nn.Module,
    forward: Callable[[], Any],
    units: Iterable[Unit],
    report: Callable[[Outcome], None],
    *,
    trials: Collection[Trial] | None = None,
    outputs: Mapping[str, str] | None = None,
    part: str = "both",
) -> None:
    """Run one frame through the float network, the quantised one, and both with each unit changed; see `lean.replay`.

    The model is as before afterwards, also when a forward raises or the run is interrupted.

    Args:
        model: calibrated; what is quantised in it as a whole is what its quantizers say now.
        forward: runs the frame through the model.
        units: of `sensitivity_units`.
        report: called with the outcome of each trial as soon as there is one.
        trials: those of `plan_trials` that are wanted; all if None.
        outputs: name -> module whose output is compared, such as `fused` -> `fuser`.
        part: which quantizers count: `both`, `inputs` or `weights`; the others are off.

    Raises:
        QuantizationError: a quantizer isn't calibrated, or a name or the part is unknown.
    """
    check_calibrated(model)
    units = {unit.name: unit for unit in units}
    wanted = [trial for trial in plan_trials(units.values()) if trials is None or trial in trials]
    if not wanted:
        return
    own = unit_quantizers(model, units.values(), part)
    _refuse_uncalibrated(own)
    everyone = unit_quantizers(model, sensitivity_units(model, part=part), part)
    whole = [quantizer for quantizers in everyone.values() for quantizer in quantizers if not quantizer._disabled]
    watched = {name: output_module(model, path) for name, path in (outputs or {}).items()}
    with (
        quantizer_flags(named_quantizers(model).values(), _disabled=True, _if_calib=False),
        replaying(model, watched.values()) as tape,
    ):
        bench = _Bench(tape, forward, watched, report)
        for base, kind, on in ((FLOAT, ALONE, ()), (INT8, WITHOUT, whole)):
            mine = [trial for trial in wanted if trial.kind in (base, kind)]
            if not mine and base != FLOAT:
                continue
            with quantizer_flags(on, _disabled=False):
                bench.record(Trial(base), Trial(base) in mine)
                for trial in mine:
                    if trial.unit:
                        with quantizer_flags(own[trial.unit], _disabled=kind == WITHOUT):
                            bench.replay(trial, units[trial.unit].layers)


class _Bench:
    """Runs trials of one frame and reports what comes of them."""

    def __init__(
        self, tape: Tape, forward: Callable[[], Any], watched: Mapping[str, str], report: Callable[[Outcome], None]
    ):
        self._tape, self._forward, self._watched, self._report = tape, forward, watched, report
        self._reference: dict[str, Any] = {}  # the float network's outputs
        self._base: dict[str, Noise] = {}  # of the recorded forward

    def record(self, trial: Trial, wanted: bool) -> None:
        """Record the forward that others are changes of; the first one must be the float network's."""
        result = self._tape.record(self._forward)
        self._reference = self._reference or dict(self._tape.outputs)
        self._base = self._noise()
        if wanted:
            self._report(Outcome(trial, self._base, result))

    def replay(self, trial: Trial, changed: Iterable[str]) -> None:
        """Replay it with the layers `changed`."""
        result = self._tape.replay(self._forward, changed)
        self._report(Outcome(trial, self._base | self._noise(), result))

    def _noise(self) -> dict[str, Noise]:
        """Noise in the outputs that were computed just now."""
        now = self._tape.outputs
        return {
            name: noise_between(self._reference[path], now[path]) for name, path in self._watched.items() if path in now
        }


def _refuse_uncalibrated(own: Mapping[str, list[TensorQuantizer]]) -> None:
    for name, quantizers in own.items():
        if any(quantizer.amax is None for quantizer in quantizers):
            raise QuantizationError(f"{name} has no amax: calibrate the model first")
