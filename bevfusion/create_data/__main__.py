"""Command line of `bevfusion.create_data`."""

import argparse
import logging
import os
import sys

from prettytable import PrettyTable

from bevfusion.cli import exit_code
from bevfusion.create_data import create_data
from bevfusion.errors import InputError
from bevfusion.nuscenes_tables import VERSIONS

DESCRIPTION = "Write BEVFusion's info files and ground-truth database from nuScenes' own tables."


def main(arguments: list[str] | None = None) -> int:
    """Convert, and print what was written; the exit code is 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m bevfusion.create_data", description=DESCRIPTION)
    parser.add_argument(
        "--root", default="data/nuscenes", help="folder with v1.0-*/, samples/ and sweeps/ (default: %(default)s)"
    )
    parser.add_argument("--version", default="v1.0-mini", choices=VERSIONS, help="default: %(default)s")
    parser.add_argument(
        "--max-sweeps", type=int, default=10, metavar="N", help="LiDAR sweeps before a keyframe (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 8), metavar="N", help="threads (default: %(default)s)"
    )
    parser.add_argument(
        "--no-database", action="store_true", help="skip the ground-truth database that ObjectPaste needs"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: write(options))


def write(options: argparse.Namespace) -> None:
    """Write the files, and say what is in them.

    Raises:
        InputError: the tables can't be used.
    """
    if options.max_sweeps < 0:
        raise InputError(f"--max-sweeps must not be negative, got {options.max_sweeps}")
    written = create_data(options.root, options.version, options.max_sweeps, options.workers, not options.no_database)
    table = PrettyTable(["written", "entries"], align="l")
    table.add_rows([*written.items()])
    print(f"{options.root}\n{table}")


if __name__ == "__main__":
    sys.exit(main())
