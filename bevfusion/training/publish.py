"""Shrink a training checkpoint to what a detector needs: ``python -m bevfusion.training.publish IN OUT [--half]``."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from bevfusion.checkpoint import extract_state_dict, read_file
from bevfusion.cli import exit_code
from bevfusion.errors import InputError


def publish(source: Path, target: Path, meta: Mapping[str, str] | None = None, half: bool = False) -> None:
    """Write the weights of a checkpoint without the optimizer's state, all of the file or nothing.

    Args:
        meta: plain values that are kept beside the weights, with the training's own progress.
        half: store parameters as float16. Buffers (BatchNorm statistics, geometry) keep their precision.

    Raises:
        InputError: `source` is no checkpoint, or a weight is beyond float16.
    """
    content = read_file(source)
    state = extract_state_dict(content, str(source))
    progress = content.get("meta", {}) if isinstance(content, Mapping) else {}
    kept = {key: progress[key] for key in ("epoch", "iter", "time") if key in progress}
    if half:
        state = {name: _halved(name, value) for name, value in state.items()}
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": {**kept, **(meta or {})}, "state_dict": state}, partial)
    os.replace(partial, target)


def _halved(name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point() or not name.endswith(("weight", "bias")):
        return value
    half = value.half()
    if not torch.isfinite(half).all():
        raise InputError(f"{name} holds a value that float16 can't: leave out --half")
    return half


def main(arguments: list[str] | None = None) -> int:
    """Publish, and say how large the file is; the exit code is 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m bevfusion.training.publish", description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint of bevfusion.train")
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--half", action="store_true", help="store weights as float16")
    args = parser.parse_args(arguments)
    status = exit_code(lambda: publish(args.source, args.target, half=args.half))
    if status == 0:
        print(f"{args.target}: {args.target.stat().st_size / 1e6:.2f} MB")
    return status


if __name__ == "__main__":
    sys.exit(main())
