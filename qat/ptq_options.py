"""The options of `qat/ptq.py`."""

import argparse
import os
from pathlib import Path

from qat import arguments, mixed_options, reporting

METHODS = ("mse", "entropy", "percentile", "max")


def percentage(text: str) -> float:
    """Parse a number above 0 and up to 100."""
    value = arguments.number(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 100, got {text!r}")
    return value


def parse_args(description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.ArgumentParser(description)
    arguments.add_model_arguments(parser)
    parser.add_argument(
        "--calibrate_batch", metavar="N", type=arguments.positive, default=300, help="frames to run over"
    )
    parser.add_argument("--save", metavar="FILE", type=Path, default=Path("qat/ckpt/bevfusion_ptq.pth"), help="result")
    parser.add_argument(
        "--method", choices=METHODS, help="how amax is chosen from the statistics (default: as the recipe says, mse)"
    )
    parser.add_argument(
        "--percentile",
        metavar="P",
        type=percentage,
        default=99.99,
        help="per cent of the values --method percentile keeps",
    )
    parser.add_argument(
        "--weight-method", choices=("max", "mse"), default="max", help="how the weights' amax is chosen"
    )
    parser.add_argument(
        "--calibrator",
        choices=("lean", "stock"),
        default="lean",
        help="stock: pytorch-quantization's own, to compare with",
    )
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="YAML recipe: what is quantised, and how")
    parser.add_argument("--save-recipe", metavar="FILE", type=Path, help="write this run's recipe, for --recipe")
    parser.add_argument(
        "--disable", metavar="PATTERN", nargs="+", action="extend", default=[], help="layers to leave in float as well"
    )
    parser.add_argument(
        "--calib-pipeline", choices=("train", "test"), default="train", help="test: frames without augmentation"
    )
    parser.add_argument(
        "--save-every",
        metavar="N",
        type=arguments.natural,
        default=50,
        help="frames between saves of unfinished statistics",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run with these options stopped"
    )
    parser.add_argument("--stats", metavar="FILE", type=Path, help="keep the statistics, for --from-stats")
    parser.add_argument(
        "--from-stats", metavar="FILE", type=Path, help="choose amax anew from kept statistics; needs no data set"
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="don't load what was saved in a fresh process to compare it with the model in memory",
    )
    parser.add_argument(
        "--on-bad-frame", choices=("stop", "skip"), default="stop", help="skip: replace frames that can't be read"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")
    parser.add_argument(
        "--no-checks", dest="checks", action="store_false", help="don't run a frame to prove folding and measure noise"
    )
    parser.add_argument("--allow-partial", action="store_true", help="go on with a checkpoint that lacks weights")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="unpickle classes in the checkpoint: it can run code"
    )
    reporting.add_report_arguments(parser, add=False)
    mixed_options.add_auto_arguments(parser)
    mixed_options.add_improvement_arguments(parser)
    arguments.add_run_arguments(parser)
    return check(parser, parser.parse_args())


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse options that don't go together."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    alone = {"--stats": args.stats, "--resume": args.resume, "--from-stats": args.from_stats, "torchrun": several}
    alone["--on-bad-frame skip"] = args.on_bad_frame == "skip"
    for name, given in alone.items():
        if args.calibrator == "stock" and given:
            parser.error(f"--calibrator stock can't be used with {name}: its histograms can't be saved or added up")
        if args.from_stats and name != "--from-stats" and given:
            parser.error(f"--from-stats runs no frames, so that {name} is of no use")
    mixed_options.check_mixed(parser, args)
    return args
