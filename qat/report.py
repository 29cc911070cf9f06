#!/usr/bin/env python3
"""Describe a quantised model on one page: its layers, what quantisation changes in them, and what it then detects."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide the standard library's

import argparse

from qat import arguments, common, reporting, tables


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = arguments.ArgumentParser(__doc__)
    arguments.add_model_arguments(parser)
    parser.add_argument("--stats", metavar="FILE", type=Path, help="statistics that ptq.py kept, for the histograms")
    reporting.add_report_arguments(parser)
    arguments.add_run_arguments(parser)
    args = parser.parse_args()
    if args.report is None:
        parser.error("say where the report goes: --report DIR")
    return args


def main() -> None:
    """Load, measure, write."""
    args = parse_arguments()
    common.set_up_logging(args)
    reporting.check_report_arguments(args, [args.ckpt])
    cfg = common.load_config(args)
    device = common.choose_device(args.device)
    common.make_repeatable(cfg.get("seed", 0) if args.seed is None else args.seed)

    from lean.statistics import Statistics
    from qat.inference import load_model
    from qat.model_report import report_model

    steps = tables.Steps()
    with steps.step("load model"):
        model = load_model(cfg, args.ckpt, device)
        made_of = getattr(model, "ptq", None)
        if made_of is None:
            raise common.UsageError(f"--ckpt {args.ckpt} is not a quantised model of qat/ptq.py: name its result")
        statistics = Statistics.load(args.stats) if args.stats else None
        if statistics:
            statistics.refuse_other({"checkpoint": made_of["checkpoint"]["sha256"]}, f"--stats {args.stats}")
    workers = common.choose_workers(args.workers, device)
    report_model(args, model, cfg, statistics, device, steps, [args.ckpt], workers)


if __name__ == "__main__":
    common.run(main)
