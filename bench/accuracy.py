"""Measure in mAP, NDS and drift what INT8 costs, and what `--auto` and the switches of `qat/ptq.py` change: one table.

    python bench/accuracy.py --config configs/demo/camera+lidar/resnet50.yaml --ckpt model/demo/bevfusion-demo.pth \
        --dataset-root DIR --calibrate_batch 40 --frames 240 --json accuracy.json

Validation scenes are divided in two, as `--auto` does: every row is scored on one half, `--auto` searches on the other.
Noise: the default with other calibration frames (rows `seed`), and the standard error of the difference to the float
model, from how much it varies over random halves of the frames.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bevfusion.data import calibration_loader, to_device
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights, model_device, observe, observing
from lean.cost import int8_layers, int8_share, measure_costs
from lean.fold import fold_dense, fold_sparse
from lean.histogram import Histogram
from lean.insert import insert_quantizers
from lean.quantize import initialize
from lean.ranges import Method, set_amax
from lean.switches import disable_quantization, named_quantizers, quantized_layers, quantizer_flags
from qat import arguments, auto, calibration, common, improve, tables
from qat.frames import Frames, choose_frames
from qat.judge import open_judges

HALVES = 8  # random halves of the frames that the standard error comes from
SEEDS = 3
CAMERA, LIDAR, DECODER = "encoders.camera.*", "encoders.lidar.*", "decoder.*"


class Bench:
    """A quantised model whose calibration and parameters can be set anew for every row of the table."""

    def __init__(self, cfg: Mapping[str, Any], args: argparse.Namespace):
        self.args, device = args, common.choose_device(args.device)
        self.seed = cfg.get("seed", 0) if args.seed is None else args.seed
        common.make_repeatable(self.seed)
        workers = calibration.choose_workers(args, device)
        self.search, self.judge = open_judges(cfg, "mAP", args.frames, self.seed, workers)
        self.model, _ = calibration.load_float_model(cfg, args)
        self.recipe = default_recipe(self.model)
        insert_quantizers(self.model, self.recipe)
        fold_sparse(self.model)
        fold_dense(self.model)
        self.model.eval().to(device)
        self.parameters = {name: dict(layer._parameters) for name, layer in quantized_layers(self.model).items()}
        self.frames = {
            seed: choose_frames(cfg, args.calib_pipeline, args.calibrate_batch, seed)
            for seed in range(self.seed, self.seed + SEEDS)
        }
        self.statistics = {seed: self._observe(frames, workers) for seed, frames in self.frames.items()}
        one = to_device(self.judge.batches()[0], device)
        with disable_quantization(self.model):
            self.costs = measure_costs(self.model, lambda: self.model(**one))

    def _observe(self, frames: Frames, workers: int) -> dict[str, Histogram]:
        loader = calibration_loader(frames.dataset, frames.indices, workers=workers, seed=frames.seed)
        device = model_device(self.model)
        with observing(self.model) as observers:
            observe(self.model, loader, len(frames.indices), lambda m, batch: m(**to_device(batch, device)))
        return observers.statistics()

    @contextmanager
    def calibrated(self, method: Method = "mse", weights: str = "max", seed: int | None = None) -> Iterator[nn.Module]:
        """The model with its own parameters, calibrated, and the recipe's layers in float."""
        for name, layer in quantized_layers(self.model).items():
            layer._parameters.update(self.parameters[name])
        with quantizer_flags(named_quantizers(self.model).values(), _disabled=False):
            calibrate_weights(self.model, weights)
            set_amax(self.model, self.statistics[self.seed if seed is None else seed], method)
        with calibration.disabled(self.model, self.recipe):
            yield self.model

    def row(self, title: str, change: Callable[[nn.Module], Any] | None = None, **how: Any) -> dict[str, Any]:
        """Score one variant: calibrate as `how` says, then let `change` do something to the model."""
        start = time.perf_counter()
        with self.calibrated(**how) as model:
            self.judge.reference(model)
            if change is not None:
                change(model)
            made = time.perf_counter() - start
            return self.score(title, self.judge.detect(model, title), int8_layers(model), made)

    def score(self, title: str, results: list[dict], int8: set[str], seconds: float) -> dict[str, Any]:
        """One row: scores, what is lost against float, and its standard error."""
        reference = self.judge.reference(self.model)
        before, after = self.judge.reference_scores(self.model), self.judge.scores(results)
        found = {
            "variant": title,
            "mAP": 100 * after.mean_ap,
            "NDS": 100 * after.nds,
            "mAP lost": 100 * (before.mean_ap - after.mean_ap),
            "NDS lost": 100 * (before.nds - after.nds),
            "drift": 100 * (self.judge.drift(reference, results).measures()["disagreement"] or 0.0),
            "INT8 MACs": 100 * int8_share(self.costs, int8, quantized_layers(self.model)),
            "seconds": seconds,
        }
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    def standard_error(self) -> dict[str, float]:
        """Standard error of the default's losses, from random halves of the frames.

        A half's deviation from the whole has the variance of the whole's own error.
        """
        with self.calibrated() as model:
            reference, results = self.judge.reference(model), self.judge.detect(model, "halves")
        generator, losses = np.random.default_rng(0), []
        tokens = self.judge.tokens
        for _ in range(HALVES):
            half = [tokens[i] for i in sorted(generator.permutation(len(tokens))[: len(tokens) // 2])]
            before, after = (self.judge.scores(found, half) for found in (reference, results))
            losses.append((100 * (before.mean_ap - after.mean_ap), 100 * (before.nds - after.nds)))
        deviation = np.std(losses, axis=0, ddof=1)
        return {"mAP lost": float(deviation[0]), "NDS lost": float(deviation[1])}


def variants(bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of the table, the float model first."""
    with bench.calibrated() as model:
        yield bench.score("float", bench.judge.reference(model), set(), 0.0)
    yield bench.row("INT8 (default)")
    for seed in list(bench.statistics)[1:]:
        yield bench.row(f"INT8, seed {seed}", seed=seed)
    for method in ("entropy", "percentile", "max"):
        yield bench.row(f"--method {method}", method=method)
        for title, pattern in (("camera", CAMERA), ("LiDAR", LIDAR), ("decoder", DECODER)):
            if not bench.args.short:
                yield bench.row(f"{title}: {method}", method={"*": "mse", pattern: method})
    yield bench.row("--weight-method mse", weights="mse")
    frames = bench.frames[bench.seed]
    for count, biases in ((10, False), (1000, False), (0, True), (1000, True)):
        options = argparse.Namespace(adaround=count, bias_correction=biases)
        title = " ".join([f"--adaround {count}"] * bool(count) + ["--bias-correction"] * biases)
        yield bench.row(title, lambda model, options=options: improve.improve(model, frames, options))
    for metric in bench.args.auto:
        yield automatic(bench, metric)


def automatic(bench: Bench, metric: str) -> dict[str, Any]:
    """The row of `--auto`."""
    args = argparse.Namespace(**{**vars(bench.args), "metric": metric, "disable": []})
    args.max_drop = bench.args.max_drop_drift if metric == "drift" else bench.args.max_drop
    start = time.perf_counter()
    with bench.calibrated() as model:
        bench.judge.reference(model)
        _, result = auto.choose_layers(model, bench.recipe, (bench.search, bench.judge), args)
        print(result.describe(), file=sys.stderr)
        with auto.floating(model, result.layers):
            results, int8 = bench.judge.detect(model, metric), int8_layers(model)
    return bench.score(f"--auto --metric {metric}", results, int8, time.perf_counter() - start)


def parse_args() -> argparse.Namespace:
    parser = arguments.ArgumentParser(__doc__)
    arguments.add_model_arguments(parser)
    parser.add_argument(
        "--calibrate_batch", metavar="N", type=arguments.positive, default=40, help="calibration frames"
    )
    parser.add_argument("--calib-pipeline", choices=("train", "test"), default="train", help="test: not augmented")
    parser.add_argument(
        "--frames", metavar="N", type=arguments.positive, default=40, help="frames of each half, at most"
    )
    parser.add_argument("--auto", nargs="*", choices=("mAP", "NDS", "drift"), default=["mAP"], help="metrics of --auto")
    parser.add_argument("--max-drop", type=float, default=0.1, help="points of mAP or NDS that --auto may lose")
    parser.add_argument("--max-drop-drift", type=float, default=3.0, help="the same for drift")
    parser.add_argument("--budget-int8", type=float, default=0.95, help="see qat/ptq.py")
    parser.add_argument("--short", action="store_true", help="leave out the methods by branch")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows here as well")
    parser.add_argument("--save", metavar="FILE", type=Path, default=Path("runs/accuracy.pth"), help=argparse.SUPPRESS)
    parser.set_defaults(allow_partial=False, trust_pickle=False)
    arguments.add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Score every variant and print the table."""
    args = parse_args()
    common.set_up_logging(args)
    initialize()
    steps = tables.Steps()
    args.save.parent.mkdir(parents=True, exist_ok=True)
    with steps.step("load, calibrate three times"):
        bench = Bench(common.load_config(args), args)
    with steps.step("score"):
        rows = list(variants(bench))
        noise = bench.standard_error()
    columns = list(rows[0])
    cells = [[row["variant"], *(f"{row[name]:.2f}" for name in columns[1:-1]), f"{row['seconds']:.0f}"] for row in rows]
    print(f"scored on {len(bench.judge.indices)} frames; --auto searched on {len(bench.search.indices)} others")
    print(tables.format_table(columns, cells, right=columns[1:]))
    print(f"standard error of the default's losses: {noise['mAP lost']:.2f} mAP, {noise['NDS lost']:.2f} NDS")
    print(steps.table())
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "standard_error": noise}, indent=2) + "\n")


if __name__ == "__main__":
    common.run(main)
