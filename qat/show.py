#!/usr/bin/env python3
"""Draw frames with what a model finds in them: six camera views and a bird's-eye view, one PNG a frame."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide the standard library's

import argparse

from qat import arguments, common


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = arguments.ArgumentParser(__doc__)
    arguments.add_model_arguments(parser)
    parser.add_argument("--compare", metavar="FILE", help="a second model file, drawn beside the first")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the pictures")
    parser.add_argument("--frame", metavar="K", type=arguments.natural, nargs="+", default=[0], help="which frames")
    parser.add_argument("--split", choices=("val", "train", "test"), default="val", help="where the frames are from")
    parser.add_argument("--score", metavar="S", type=float, default=0.3, help="least score of a drawn detection")
    parser.add_argument(
        "--z-at-centre",
        action="store_true",
        help="the model's z is a box's centre, as in checkpoints trained with the original BEVFusion code",
    )
    arguments.add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Detect, draw, write."""
    args = parse_arguments()
    common.set_up_logging(args)
    cfg = common.load_config(args)
    device = common.choose_device(args.device)
    common.make_repeatable(cfg.get("seed", 0) if args.seed is None else args.seed)

    import numpy as np

    from bevfusion.visualize import render_frame, write_image
    from qat.inference import Detector, ensure_writable, evaluation_dataset, short_names
    from qat.pictures import drawable, load_frame

    dataset = evaluation_dataset(cfg, args.split)
    if max(args.frame) >= len(dataset):
        raise common.UsageError(f"--frame {max(args.frame)}: {dataset.ann_file} has frames 0 to {len(dataset) - 1}")
    pictures = [Path(args.out) / f"{index:05d}_{dataset.data_infos[index].token}.png" for index in args.frame]
    ensure_writable(pictures[0])
    detector = Detector(cfg, dataset, device, args.workers or 0)
    files = [file for file in (args.ckpt, args.compare) if file]
    found = {name: detector(file, args.frame, name) for name, file in zip(short_names(files), files, strict=True)}
    for number, (index, picture) in enumerate(zip(args.frame, pictures, strict=True)):
        sensors, truth = load_frame(dataset, index)
        panels = [
            render_frame(sensors, dataset.CLASSES, truth, drawable(results[number], args.score, args.z_at_centre), name)
            for name, results in found.items()
        ]
        write_image(picture, np.hstack(panels))
        print(f"written: {picture}")


if __name__ == "__main__":
    common.run(main)
