"""Measure how each way to choose amax, in each part of the model, changes what the model computes.

    python bench/methods.py --ckpt CHECKPOINT --dataset-root DIR --frames 8 --score 100

One part at a time computes in INT8, the others in float. The error is |quantised - float| / |float| (L2 norms, over all
frames) of the decoder's BEV features and of the dense heatmap of the head. With --score N the official mAP and NDS of N
validation frames, less those of the float model, are measured as well.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bevfusion.data import FrameLoader, calibration_loader, to_device
from bevfusion.evaluation import score_submission, to_submission
from bevfusion.nuscenes_tables import open_nuscenes
from lean.amax import METHODS
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights, observe, observing
from lean.fold import fold_dense, fold_sparse
from lean.histogram import Histogram
from lean.insert import insert_quantizers
from lean.matching import matches, select
from lean.quantize import initialize
from lean.ranges import set_amax
from lean.switches import quantized_layers, quantizer_flags
from qat import arguments, calibration, common, tables
from qat.frames import choose_frames
from qat.inference import evaluation_dataset, spread

PARTS = {
    "camera backbone and neck": ("encoders.camera.backbone.*", "encoders.camera.neck.*"),
    "camera vtransform": ("encoders.camera.vtransform.*",),
    "lidar backbone": ("encoders.lidar.backbone.*",),
    "fuser": ("fuser.*",),
    "decoder": ("decoder.*",),
    "all": ("*",),
}


def outputs(model: nn.Module, batches: Iterable) -> list[tuple[Tensor, Tensor]]:
    """BEV features and dense heatmap of each batch."""
    head, found = model.heads["object"], []
    keep: dict[str, Tensor] = {}
    hooks = [
        head.shared_conv.register_forward_pre_hook(lambda _, inputs: keep.update(features=inputs[0])),
        head.heatmap_head.register_forward_hook(lambda _, __, output: keep.update(heatmap=output)),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            found.append((keep["features"].cpu(), keep["heatmap"].cpu()))
    for hook in hooks:
        hook.remove()
    return found


def relative_errors(actual: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> list[float]:
    """L2 norm of the difference over that of `expected`, for each kind of output."""
    pairs = list(zip(actual, expected, strict=True))
    return [
        math.sqrt(
            sum((a[kind] - e[kind]).double().square().sum().item() for a, e in pairs)
            / sum(e[kind].double().square().sum().item() for _, e in pairs)
        )
        for kind in range(2)
    ]


def part_on(model: nn.Module, part: tuple[str, ...], off: Iterable[str]) -> AbstractContextManager:
    """Let only the layers of a part quantise, without those that the recipe leaves in float, for a `with` block."""
    groups: dict[bool, set] = {True: set(), False: set()}
    for name, layer in quantized_layers(model).items():
        groups[matches(name, part) and name not in off].update(layer.quantizers)
    return quantizer_flags(groups[False] - groups[True], _disabled=True)


def official_scores(cfg: Mapping, count: int, workers: int, device: torch.device) -> Callable[[nn.Module], list[float]]:
    """What gives a model's mAP and NDS, in per cent, on `count` validation frames, which are loaded once."""
    dataset = evaluation_dataset(cfg)
    indices = spread(len(dataset), count)
    frames = [dataset.data_infos[index] for index in indices]
    batches = list(FrameLoader(dataset, 1, workers, sampler=indices))
    nuscenes = open_nuscenes(dataset.dataset_root, dataset.version)

    @torch.no_grad()
    def scores(model: nn.Module) -> list[float]:
        results = [found for batch in batches for found in model(**to_device(batch, device))]
        submission = to_submission(results, frames, dataset.CLASSES, dataset.modality)
        found = score_submission(submission, nuscenes, [frame.token for frame in frames])
        return [100 * found.mean_ap, 100 * found.nds]

    return scores


def measure(
    model: nn.Module,
    statistics: Mapping[str, Histogram],
    batches: list[dict],
    off: list[str],
    parts: list[str],
    scores: Callable[[nn.Module], list[float]],
) -> list[tuple]:
    """Rows: part, method, errors of BEV features and heatmap in per cent, and by how much `scores` differ from float.

    The first row is the float model's, with its own scores.
    """
    with part_on(model, (), ()):
        expected, reference = outputs(model, batches), scores(model)
    rows = [("none", "-", "0.00", "0.00", *(f"{score:.2f}" for score in reference))]
    for part, method in itertools.product(parts, METHODS):
        set_amax(model, statistics, method)
        with part_on(model, PARTS[part], off):
            errors = relative_errors(outputs(model, batches), expected)
            changes = [score - before for score, before in zip(scores(model), reference, strict=True)]
        cells = (*(f"{100 * error:.2f}" for error in errors), *(f"{change:+.2f}" for change in changes))
        rows.append((part, method, *cells))
        print(*rows[-1], flush=True, file=sys.stderr)
    return rows


def parse_args() -> argparse.Namespace:
    parser = arguments.ArgumentParser(__doc__)
    arguments.add_model_arguments(parser)
    parser.add_argument("--frames", type=arguments.positive, default=4, help="frames to calibrate on and to compare on")
    parser.add_argument("--score", metavar="N", type=arguments.positive, help="score N validation frames as well")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to quantise, in turn")
    parser.set_defaults(allow_partial=False, trust_pickle=False)
    arguments.add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Calibrate once, then run every part with every method."""
    args = parse_args()
    common.set_up_logging(args)
    initialize()
    cfg, device = common.load_config(args), common.choose_device(args.device)
    common.make_repeatable(0)
    model, _ = calibration.load_float_model(cfg, args)
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    fold_sparse(model)
    fold_dense(model)
    model.eval().to(device)
    frames = choose_frames(cfg, "test", args.frames, 0)
    loader = calibration_loader(frames.dataset, frames.indices, workers=args.workers or 0)
    batches = [to_device(batch, device) for batch in loader]
    calibrate_weights(model)
    with observing(model) as observers:
        observe(model, batches, len(batches), lambda m, batch: m(**batch), None, lambda *_: None)
    off = select(recipe.disable, quantized_layers(model), "the recipe's disable pattern")
    scores = official_scores(cfg, args.score, args.workers or 0, device) if args.score else lambda _: []
    rows = measure(model, observers.statistics(), batches, off, args.parts, scores)
    headers = ("part in INT8", "method", "BEV features, %", "heatmap, %", "mAP", "NDS")[: len(rows[0])]
    print(tables.format_table(headers, rows, right=headers[2:]))


if __name__ == "__main__":
    common.run(main)
