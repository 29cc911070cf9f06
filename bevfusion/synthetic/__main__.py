"""Command line of the synthetic world: ``python -m bevfusion.synthetic --out data/demo``."""

import argparse
import sys
from pathlib import Path

from bevfusion.cli import exit_code
from bevfusion.synthetic.world import generate


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options; argparse exits with code 2 where they don't parse."""
    parser = argparse.ArgumentParser(
        prog="python -m bevfusion.synthetic", description="Write a synthetic nuScenes data set."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; a stopped run is completed")
    parser.add_argument(
        "--version", default="v1.0-mini", help="v1.0-mini (default) or v1.0-trainval: decides scene names"
    )
    parser.add_argument("--scenes", type=int, help="scenes for training (default: 8)")
    parser.add_argument("--val-scenes", type=int, help="scenes for validation (default: 2)")
    parser.add_argument("--frames", type=int, help="keyframes a scene, two a second (default: 20)")
    parser.add_argument("--image-size", type=_size, metavar="WxH", help="pixels of an image (default: 800x450)")
    parser.add_argument("--seed", type=int, help="equal seeds give equal bytes (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one per processor)")
    parser.add_argument(
        "--sweeps", type=int, help="LiDAR sweeps on disk before each keyframe, 20 a second (default: 2)"
    )
    parser.add_argument("--camera-sweeps", type=int, help="images before each keyframe, 12 a second (default: 0)")
    parser.add_argument("--sweep-motion", action="store_true", help="let sensor and objects move during a LiDAR sweep")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Generate; returns the exit code: 2 for bad input, 130 when interrupted."""
    given = {k: v for k, v in vars(parse(arguments)).items() if v is not None}
    out = given.pop("out")
    status = exit_code(lambda: generate(out, **given), "interrupted: the same command completes it")
    if status == 0:
        print(f"{out} is complete: load it with NuScenes({given['version']!r}, {str(out)!r})")
    return status


if __name__ == "__main__":
    sys.exit(main())
