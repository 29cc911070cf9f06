"""Quantise a trained BEVFusion to INT8 after training: calibrate on training frames, save the quantised model."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import os

from qat import common, reporting, tables
from qat.fresh_process import FreshProcess, verifier
from qat.ptq_options import parse_args


def main() -> None:
    """Quantise, while another process gets ready to verify the result."""
    args = parse_args(__doc__)
    common.set_up_logging(args)
    with verifier() as fresh:
        first = os.environ.get("RANK", "0") == "0"  # as `lean.distributed.rank`, whose import takes seconds
        if args.verify and not args.dry_run and first:
            fresh.start()
        quantise(args, fresh)


def quantise(args: argparse.Namespace, fresh: FreshProcess) -> None:
    """Load, insert quantizers, fold, calibrate, disable, save; then say what was done."""
    steps = tables.Steps()
    with steps.step("import"), common.importing():
        from lean.distributed import local_device, process_group, rank
        from qat import auto, calibration, gates, saving, verification
        from qat.improve import improve
        from qat.model_report import report_model
        from qat.preflight import left_float, plan, preflight
        from qat.recipes import insert_by_recipe
        from qat.summary import summary

    calibration.check_outputs(args)
    reporting.check_report_arguments(args)
    cfg = common.load_config(args)
    device = local_device(common.choose_device(args.device))
    seed = cfg.get("seed", 0) if args.seed is None else args.seed
    common.make_repeatable(seed, cfg.get("deterministic", False))

    with saving.claim(args.save):
        with contextlib.redirect_stdout(sys.stdout if rank() == 0 else None), process_group(device):
            with steps.step("load checkpoint"):
                model, checkpoint = calibration.load_float_model(cfg, args)
            with steps.step("find frames"):
                frames = calibration.find_frames(cfg, args, seed)
                judges = auto.prepare(args, cfg, seed, calibration.choose_workers(args, device))
            with steps.step("insert quantizers"):
                recipe, inserted = insert_by_recipe(model, args)
            with steps.step("preflight"):
                preflight(model, frames, args.save, device)
            if args.dry_run:
                print(plan(model, left_float(model, inserted, recipe, args.disable), frames, args.save))
                return
            with steps.step("fold batch norm"):
                model.to(device)
                sample = gates.load_sample(frames, device) if frames and args.checks and rank() == 0 else None
                print(gates.fold(model, recipe, sample))
            with steps.step("calibrate"):
                made = calibration.made_of(args, cfg, recipe, frames, checkpoint)
                workers = calibration.choose_workers(args, device)
                method = args.method or recipe.method_table()
                statistics = calibration.calibrate(model, frames, made, method, args, workers)
        if rank() > 0:
            return
        with steps.step("choose what stays float"):
            recipe, found = auto.choose_layers(model, recipe, judges, args)
        with steps.step("disable and check"):
            calibration.disable(model, recipe, args.disable)
            improved = improve(model, frames, args)
            measured = gates.check(model, recipe, sample)
        with saving.staged(args.save) as staging:
            with steps.step("save"):
                made = statistics.made_of if statistics else made
                made_of = calibration.provenance(args, cfg, recipe, method, made) | auto.record(found) | improved
                files = saving.write(model, args.save, staging, made_of)
            with steps.step("verify"):
                verified = verification.verify(model, files, frames, fresh) if args.verify else verification.SKIPPED

        saving.warn_if_replaced(args.ckpt, checkpoint)
        print(summary(model, recipe, left_float(model, inserted, recipe, args.disable), measured, made))
        print(steps.table(), *auto.found_lines(found, args.save), verified, sep="\n")
        for path in saving.outputs(args.save):
            print(f"wrote {tables.sized(path)}")
        report_model(args, model, cfg, statistics, device, steps, saving.outputs(args.save), workers)


if __name__ == "__main__":
    common.run(main)
