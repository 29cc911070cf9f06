#!/usr/bin/env python3
"""Score a model, or the ONNX files of one, with nuScenes' official metrics; or two side by side."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide the standard library's

import argparse
import json
from typing import TYPE_CHECKING

from qat import arguments, common, reporting, tables

if TYPE_CHECKING:
    import mmcv
    from nuscenes import NuScenes

    from bevfusion.data import NuScenesDataset


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = arguments.ArgumentParser(__doc__)
    arguments.add_model_arguments(parser)
    parser.add_argument("--compare", metavar="FILE", help="a second model file, run over the same frames")
    parser.add_argument("--onnx", metavar="DIR", help="score the files that qat/export.py wrote, instead of --ckpt")
    parser.add_argument(
        "--lidar-arithmetic",
        choices=("integer", "float"),
        default="integer",
        help="how the LiDAR branch's file computes: as each layer states, like the runtime, or in float32",
    )
    parser.add_argument(
        "--half-points", action="store_true", help="round points to FP16 before the files, as the runtime's are"
    )
    parser.add_argument(
        "--round-lidar",
        action="store_true",
        help="round a model's LiDAR branch to FP16, as its file is, to compare it with the files",
    )
    parser.add_argument(
        "--dump", metavar="DIR", help="write the first frame's inputs and outputs of every stage here, as .tensor files"
    )
    parser.add_argument("--results", metavar="FILE", help="score this results file instead of running a model")
    parser.add_argument("--limit", metavar="N", type=arguments.positive, help="only N frames, evenly spread over all")
    parser.add_argument("--out", metavar="FILE", help="write the detections here, in nuScenes' submission format")
    parser.add_argument("--metrics", metavar="FILE", help="write the scores here, as JSON")
    reporting.add_report_arguments(parser, frames=False)
    arguments.add_run_arguments(parser)
    args = parser.parse_args()
    if args.results and (args.compare or args.out or args.report):
        parser.error("--results scores detections that exist: leave out --compare, --out and --report")
    if args.results and (args.onnx or args.dump):
        parser.error("--results scores detections that exist: leave out --onnx and --dump")
    if args.onnx and args.report:
        parser.error("--report is about models: leave out --onnx, or give the model with --ckpt")
    return args


def main() -> None:
    """Detect, score, print."""
    args = parse_arguments()
    common.set_up_logging(args)
    if args.onnx and not Path(args.onnx).is_dir():
        raise common.UsageError(f"--onnx {args.onnx}: no such folder; qat/export.py writes one")
    files = [args.results] if args.results else [file for file in (args.onnx or args.ckpt, args.compare) if file]
    outputs, dumps = output_files(args.out, len(files)), output_files(args.dump, len(files))
    reporting.check_report_arguments(args, files)
    cfg = common.load_config(args)
    device = common.choose_device(args.device)
    common.make_repeatable(cfg.get("seed", 0) if args.seed is None else args.seed)

    from bevfusion.evaluation import (
        class_table,
        load_submission,
        save_submission,
        score_submission,
        summary_table,
        to_submission,
    )
    from qat.inference import Detector, ensure_writable, short_names, spread

    for path in filter(None, [*outputs, args.metrics]):
        ensure_writable(path)
    roles = reporting.roles_of(files) if args.report else []
    steps = tables.Steps()
    with steps.step("open the data set"):
        dataset, nuscenes = open_data(cfg)
    workers = cfg.data.workers_per_gpu if args.workers is None else args.workers
    files_as = {"integer": args.lidar_arithmetic == "integer", "half_points": args.half_points}
    detector = Detector(cfg, dataset, device, workers, round_lidar=args.round_lidar, **files_as)
    indices = spread(len(dataset), args.limit)
    frames = [dataset.data_infos[index] for index in indices]
    scores, results = {}, []
    for name, file, output, dump in zip(short_names(files), files, outputs, dumps, strict=True):
        if dump:
            with steps.step(f"dump a frame of {name}"):
                detector.dump(file, indices[0], dump)
        with steps.step(f"{'read' if args.results else 'detect with'} {name}"):
            if args.results:
                submission = load_submission(file)
            else:
                found = detector(file, indices, name)
                results.append(found if args.report else [])
                submission = to_submission(found, frames, dataset.CLASSES, dataset.modality)
        if output:
            save_submission(submission, output)
        with steps.step(f"score {name}"):
            scores[name] = score_submission(submission, nuscenes, [frame.token for frame in frames])
    print(f"{len(frames)} of the {len(dataset)} frames of {dataset.ann_file} ({nuscenes.version})")
    print(summary_table(scores), class_table(scores), steps.table(), sep="\n")
    if args.metrics:
        text = json.dumps({name: score.to_dict() for name, score in scores.items()}, indent=2)
        Path(args.metrics).write_text(f"{text}\n", encoding="utf-8")
    for path in filter(None, [*outputs, args.metrics, *dumps]):
        print(f"written: {path}")
    if args.report:
        reporting.report_scores(
            args, scores, results, dict(zip(roles, files, strict=True)), dataset, indices, device, steps
        )


def output_files(out: str | None, count: int) -> list[str | None]:
    """Where the results of each of `count` models go: `out`, and for a second `out` with -compare before its ending."""
    if out is None:
        return [None] * count
    path = Path(out)
    return [out, str(path.with_name(f"{path.stem}-compare{path.suffix}"))][:count]


def open_data(cfg: "mmcv.Config") -> "tuple[NuScenesDataset, NuScenes]":
    """Validation frames, and the tables that they were made from.

    Raises:
        InputError: either can't be used.
    """
    from bevfusion.errors import InputError
    from bevfusion.nuscenes_tables import open_nuscenes
    from qat.inference import evaluation_dataset

    dataset = evaluation_dataset(cfg)
    if not dataset.version:
        raise InputError(f"{dataset.ann_file} does not name its nuScenes version; write it with bevfusion.create_data")
    return dataset, open_nuscenes(dataset.dataset_root, dataset.version)


if __name__ == "__main__":
    common.run(main)
