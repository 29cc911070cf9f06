"""The command line of the scripts of this folder: a parser, and the options that several of them have."""

import argparse
import math
from typing import NoReturn

DEFAULT_CONFIG = "bevfusion/configs/nuscenes/det/transfusion/secfpn/camera+lidar/resnet50/convfuser.yaml"
DEFAULT_CKPT = "model/resnet50/bevfusion-det.pth"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds to the help of an option its default, if it has one that tells something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.nargs == 0 or action.default in (None, [])
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows defaults, takes no abbreviations, and reports a mistake in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model and which data."""
    parser.add_argument("--config", metavar="FILE", default=DEFAULT_CONFIG, help="YAML config of the model and data")
    parser.add_argument("--ckpt", metavar="FILE", default=DEFAULT_CKPT, help="checkpoint with the float weights")
    parser.add_argument(
        "--dataset-root", metavar="DIR", help="folder of nuScenes and its info files, instead of the config's"
    )
    parser.add_argument(
        "--cfg-options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override config keys, for example data.samples_per_gpu=2",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to run: device, workers, seed, logging."""
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--workers", metavar="N", type=natural, help="data loading processes (default: by the machine)")
    parser.add_argument("--seed", metavar="N", type=natural, help="random seed (default: the config's)")
    add_logging_arguments(parser)


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    """Add -v, -q and --log-file."""
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice: everything")
    parser.add_argument("-q", "--quiet", action="store_true", help="log errors only")
    parser.add_argument("--log-file", metavar="FILE", help="write the complete log to this file as well")


def natural(text: str) -> int:
    """Parse an integer from 0 to what fits a seed (32 bits)."""
    return _integer(text, 0)


def positive(text: str) -> int:
    """Parse an integer of 1 or more."""
    return _integer(text, 1)


def number(text: str) -> float:
    """Parse a number; NaN, which no range holds, if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _integer(text: str, least: int) -> int:
    if not (text.isdecimal() and least <= int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {text!r}")
    return int(text)
