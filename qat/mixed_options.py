"""The options of `qat/ptq.py` for mixed precision, and for improving what stays in INT8."""

import argparse
import math

from qat import arguments

METRICS = ("mAP", "NDS", "drift")


def points(text: str) -> float:
    """Parse a finite number of 0 or more."""
    value = arguments.number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return value


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    value = arguments.number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def add_auto_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --auto and the options that go with it."""
    parser.add_argument("--auto", action="store_true", help="find the layers to leave in FP16; writes a recipe, too")
    parser.add_argument("--max-drop", metavar="P", type=points, default=0.2, help="points of --metric that may be lost")
    parser.add_argument("--metric", choices=METRICS, default="mAP", help="what --auto judges by; drift needs no labels")
    parser.add_argument(
        "--budget-int8", metavar="X", type=share, default=0.95, help="part of the quantised MACs that stays in INT8"
    )
    parser.add_argument(
        "--auto-frames",
        metavar="N",
        type=arguments.positive,
        default=64,
        help="validation frames that --auto searches on, and as many others that it verifies on",
    )


def add_improvement_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the switches that change parameters for less quantisation error."""
    parser.add_argument(
        "--adaround",
        metavar="N",
        type=arguments.natural,
        default=0,
        help="round the weights of the N worst layers adaptively",
    )
    parser.add_argument("--bias-correction", action="store_true", help="correct each bias by the mean error it sees")


def check_mixed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of --auto without it, and improvements without frames to measure on."""
    for name in ("max_drop", "metric", "budget_int8", "auto_frames"):
        if not args.auto and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is of use with --auto only")
    for name, given in (("--adaround", args.adaround), ("--bias-correction", args.bias_correction)):
        if given and args.from_stats:
            parser.error(f"--from-stats runs no calibration frames, which {name} needs")
