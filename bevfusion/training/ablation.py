"""What each branch contributes: the official metrics with a branch's bird's-eye-view features set to zero.

``python -m bevfusion.training.ablation --config … --ckpt … [--out scores.json]``
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from bevfusion.checkpoint import load_checkpoint
from bevfusion.cli import exit_code
from bevfusion.config import load_config
from bevfusion.evaluation import class_table, summary_table
from bevfusion.models import build_model
from bevfusion.training.validation import Validation

LAST_MODULES = {"camera": "encoders.camera.vtransform", "lidar": "encoders.lidar.backbone"}


@contextmanager
def without(model: nn.Module, branch: str) -> Iterator[None]:
    """Let a branch (camera or lidar) give zeros for the length of a `with` block."""
    last = model.get_submodule(LAST_MODULES[branch])
    hook = last.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        hook.remove()


def compare(args: argparse.Namespace) -> None:
    """Score the model whole and without each branch; print tables, and write `args.out`."""
    logging.basicConfig(level=logging.WARNING)
    root = [] if args.dataset_root is None else [f"dataset_root={args.dataset_root.rstrip('/')}/"]
    cfg = load_config(args.config, [*root, *args.cfg_options])
    model = build_model(cfg.model)
    load_checkpoint(model, args.ckpt)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    validation = Validation(cfg, cfg.data.workers_per_gpu if args.workers is None else args.workers)
    scores = {"whole": validation(model)}
    for branch in model.encoders if len(model.encoders) > 1 else ():
        with without(model, branch):
            scores[f"without {branch}"] = validation(model)
    print(f"{scores['whole'].frames} frames of {validation.dataset.ann_file}")
    print(class_table({"whole": scores["whole"]}), summary_table(scores), sep="\n")
    if args.out:
        content = {name: score.to_dict() for name, score in scores.items()}
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Compare; the exit code is 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m bevfusion.training.ablation", description=__doc__)
    parser.add_argument("--config", metavar="FILE", required=True)
    parser.add_argument("--ckpt", metavar="FILE", required=True, help="float checkpoint")
    parser.add_argument("--dataset-root", metavar="DIR", help="folder of nuScenes, instead of the config's")
    parser.add_argument("--cfg-options", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    parser.add_argument("--workers", metavar="N", type=int, help="loading processes (default: the config's)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the scores here, as JSON")
    args = parser.parse_args(arguments)
    return exit_code(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
