"""Quantise a trained BEVFusion to INT8 after training: calibrate on training frames, save the quantised model."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import math
import os

from qat import common, mixed_options, reporting, tables
from qat.fresh_process import FreshProcess, verifier

METHODS = ("mse", "entropy", "percentile", "max")


def percentage(text: str) -> float:
    """Parse a number above 0 and up to 100."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 100, got {text!r}")
    return value


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = common.ArgumentParser(__doc__)
    common.add_model_arguments(parser)
    parser.add_argument("--calibrate_batch", metavar="N", type=common.positive, default=300, help="frames to run over")
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
        type=common.natural,
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
    common.add_run_arguments(parser)
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


def main() -> None:
    """Quantise, while another process gets ready to verify the result."""
    args = parse_args()
    common.set_up_logging(args)
    with verifier() as fresh:
        first = os.environ.get("RANK", "0") == "0"  # as `lean.distributed.rank`, whose import takes seconds
        if args.verify and not args.dry_run and first:
            fresh.start()
        quantise(args, fresh)


def quantise(args: argparse.Namespace, fresh: FreshProcess) -> None:
    """Load, insert quantizers, fold, calibrate, disable, save; then say what was done."""
    steps = tables.Steps()
    with steps.step("import"):
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
                verified = "not verified (--no-verify)"
                if args.verify:
                    verified = verification.verify(model, files, frames, fresh)

        saving.warn_if_replaced(args.ckpt, checkpoint)
        print(summary(model, recipe, left_float(model, inserted, recipe, args.disable), measured, made))
        print(steps.table())
        if found:
            print(f"{found.describe()}\nrecipe: {auto.recipe_file(args.save)}")
        print(verified)
        for path in saving.outputs(args.save):
            print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
        report_model(args, model, cfg, statistics, device, steps, saving.outputs(args.save), workers)


if __name__ == "__main__":
    common.run(main)
