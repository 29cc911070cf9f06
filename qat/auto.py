"""Automatic mixed precision: which layers to leave in FP16 so that the detections stay as good."""

import argparse
import dataclasses
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from bevfusion.data import to_device
from lean.bevfusion_recipe import OUTPUTS
from lean.calibrate import model_device
from lean.cost import CostModel, int8_layers, int8_share, measure_costs
from lean.mixed import Candidate, Choice, rank, search
from lean.recipe import Recipe
from lean.sensitivity import ALONE, Outcome, plan_trials, run_trials, sensitivity_units
from lean.switches import disable_quantization, quantized_layers, quantizer_flags
from qat import calibration, tables
from qat.inference import spread
from qat.judge import Judge, open_judges
from qat.recipes import save_recipe

logger = logging.getLogger("qat")

BENEFIT_FRAMES = 4  # of the frames to search on
OUTPUT = OUTPUTS["decoder"]  # everything that is quantised ends there


@dataclasses.dataclass(frozen=True)
class Result:
    """What `--auto` found.

    Attributes:
        choice: drops on the frames that were searched on.
        verified: drop on other frames, before (the recipe's own layers in float) and with the layers chosen as well.
        share: part in INT8, before and after, of the MACs of the layers that can be quantised; share_of_all: of all.
        slower: how much more time the frame is estimated to take, relative to before.
    """

    metric: str
    target: float
    frames: tuple[int, int]
    choice: Choice
    verified: tuple[float, float]
    share: tuple[float, float]
    share_of_all: tuple[float, float]
    slower: float
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether the target is met on the frames that were searched on and on the others."""
        return self.choice.met and self.verified[1] <= self.target

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers to leave in FP16: those chosen, or none if they don't help on the frames not searched on."""
        return self.choice.layers if self.kept or self.verified[1] < self.verified[0] else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and names, for the model's record."""
        fields = ("metric", "target", "frames", "verified", "share", "share_of_all", "slower", "seconds", "kept")
        found = {name: getattr(self, name) for name in fields}
        drops = (self.choice.attempts[0].drop, self.choice.best.drop)
        return found | {
            "layers": list(self.layers),
            "searched": drops,
            "measurements": len(self.choice.attempts),
        }

    def describe(self) -> str:
        """The result as lines of text."""
        before, after = self.choice.attempts[0].drop, self.choice.best.drop
        rows = [
            (f"{self.metric} lost, searched on {self.frames[0]} frames", f"{before:.2f}", f"{after:.2f}"),
            (f"{self.metric} lost, verified on {self.frames[1]} others", *(f"{x:.2f}" for x in self.verified)),
            ("MACs in INT8, of what can be quantised", *(f"{100 * x:.1f} %" for x in self.share)),
            ("MACs in INT8, of the whole model", *(f"{100 * x:.1f} %" for x in self.share_of_all)),
        ]
        table = tables.format_table(("points", "before", "with them"), rows, right=("before", "with them"))
        layers = ", ".join(self.layers) or f"none: {'the target is met without' if self.kept else 'no layers helped'}"
        if not self.layers and self.choice.layers:
            layers = f"none: {', '.join(self.choice.layers)} helped on the frames searched on, but not on the others"
        target = f"at most {self.target:g} points of {self.metric}"
        outcome = f"{target}: " + ("met" if self.kept else "NOT met; the table says how far it came")
        effort = f"{len(self.choice.attempts)} measurements, {self.seconds:.0f} s; estimated frame {self.slower:+.1%}"
        return f"{table}\nleft in FP16 as well: {layers}\n{outcome}\n{effort}"


def prepare(args: argparse.Namespace, cfg: Mapping[str, Any], seed: int, workers: int) -> tuple[Judge, Judge] | None:
    """Open the frames of `--auto` before the long part of the run; None without it.

    Raises:
        InputError: see `qat.judge.open_judges`.
    """
    return open_judges(cfg, args.metric, args.auto_frames, seed, workers) if args.auto else None


def record(result: Result | None) -> dict[str, Any]:
    """What of the result goes into the model's record."""
    return {"auto": result.to_dict()} if result else {}


def recipe_file(save: Path) -> Path:
    """Where the recipe that was found goes, beside the model."""
    return save.with_name(f"{save.stem}.recipe.yaml")


def found_lines(result: Result | None, save: Path) -> list[str]:
    """What to say of the result, and where its recipe lies."""
    return [result.describe(), f"recipe: {recipe_file(save)}"] if result else []


def choose_layers(
    model: nn.Module, recipe: Recipe, judges: tuple[Judge, Judge] | None, args: argparse.Namespace
) -> tuple[Recipe, Result | None]:
    """Find what to leave in floating point, and write the recipe for it; without judges the recipe stays as it is.

    The layers that `recipe` and `--disable` name are left in floating point in any case. `model` stays as it is.

    Raises:
        InputError: a frame can't be read.
        QuantizationError: the recipe can't be written.
    """
    if judges is None:
        return recipe, None
    start = time.perf_counter()
    recipe = dataclasses.replace(recipe, disable=(*recipe.disable, *args.disable))
    layers = quantized_layers(model)
    with calibration.disabled(model, recipe):
        int8 = int8_layers(model)
        costs = _costs(model, judges[0])
        estimate = CostModel(costs)

        def measure(judge: Judge, chosen: tuple[Candidate, ...]) -> float:
            with floating(model, {name for candidate in chosen for name in candidate.layers}):
                drop = judge.drop(model, args.metric, f"{len(chosen)} in FP16")
            logger.info("%d in FP16: %s drop %.3f", len(chosen), args.metric, drop)
            return drop

        def enough(remaining: Collection[str]) -> bool:
            return int8_share(costs, remaining, layers) >= args.budget_int8

        before = measure(judges[0], ())
        known = [] if before <= args.max_drop else candidates(model, judges[0])
        order = rank(known, int8, estimate.time, enough)
        choice = search(order, lambda chosen: measure(judges[0], chosen) if chosen else before, args.max_drop)
        verified = [measure(judges[1], chosen) for chosen in dict.fromkeys([(), choice.best.chosen])]
    after = int8.difference(choice.layers)
    result = Result(
        args.metric,
        args.max_drop,
        tuple(len(judge.indices) for judge in judges),
        choice,
        (verified[0], verified[-1]),
        share=tuple(int8_share(costs, names, layers) for names in (int8, after)),
        share_of_all=tuple(int8_share(costs, names) for names in (int8, after)),
        slower=estimate.time(after) / estimate.time(int8) - 1,
        seconds=time.perf_counter() - start,
    )
    if not result.kept:
        logger.warning("--auto: the target was not met: %.2f points lost", max(choice.best.drop, result.verified[1]))
    found = dataclasses.replace(recipe, disable=(*recipe.disable, *result.layers))
    save_recipe(found, recipe_file(args.save), f"found by qat/ptq.py --auto\n{result.describe()}")
    return found, result


def candidates(model: nn.Module, judge: Judge, frames: int = BENEFIT_FRAMES) -> list[Candidate]:
    """Each unit that is in INT8 now, with the noise power that it alone causes in the decoder's output."""
    units = [unit for unit in sensitivity_units(model) if not unit.left_float]
    trials = [trial for trial in plan_trials(units) if trial.kind == ALONE]
    noise = {unit.name: 0.0 for unit in units}
    device = model_device(model)

    def note(outcome: Outcome) -> None:
        noise[outcome.trial.unit] += outcome.noise["output"].relative ** 2

    batches = judge.batches()
    chosen = [batches[i] for i in spread(len(batches), frames)]
    for batch in tqdm(chosen, "sensitivity", unit="frame", disable=None, leave=False):
        one = to_device(batch, device)
        run_trials(model, lambda one=one: model(**one), units, note, trials=trials, outputs={"output": OUTPUT})
    return [Candidate(unit.layers, noise[unit.name]) for unit in units]


def _costs(model: nn.Module, judge: Judge) -> dict:
    one = to_device(judge.batches()[0], model_device(model))
    with disable_quantization(model):
        return measure_costs(model, lambda: model(**one))


@contextmanager
def floating(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let the layers `names` compute in floating point for the length of a `with` block."""
    layers = quantized_layers(model)
    with quantizer_flags([q for name in names for q in layers[name].quantizers], _disabled=True):
        yield
