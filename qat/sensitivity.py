"""Measure what each quantised layer costs: quantise it alone, and everything but it, on a few frames."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide the standard library's

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qat import arguments, common, reporting, tables

if TYPE_CHECKING:
    from qat.trials import Experiment

PARTS = {"both": "both", "activations": "inputs", "weights": "weights"}  # as the option and as the library call them
METRICS = ("drift", "mAP", "NDS")
SHOWN = 30  # rows of the printed table


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.ArgumentParser(__doc__)
    arguments.add_model_arguments(parser)
    parser.add_argument("--frames", metavar="N", type=arguments.positive, default=16, help="frames, evenly spread")
    parser.add_argument("--split", choices=("val", "train", "test"), default="val", help="where the frames are from")
    parser.add_argument("--metric", choices=METRICS, default="drift", help="what the table is sorted by")
    parser.add_argument("--parts", choices=tuple(PARTS), default="both", help="what of a layer is quantised")
    parser.add_argument("--only", metavar="GLOB", nargs="+", action="extend", default=[], help="only these layers")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("runs/sensitivity.json"), help="JSON; a CSV lies beside it"
    )
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    add_calibration_arguments(parser)
    reporting.add_report_arguments(parser, frames=False)
    arguments.add_run_arguments(parser)
    args = parser.parse_args()
    if args.out.suffix not in (".json", ".csv"):
        parser.error(f"--out {args.out}: name a .json or .csv file; both are written")
    args.only = args.only or ["*"]
    return args


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a float checkpoint is quantised, which are those of `qat/ptq.py`."""
    parser.add_argument(
        "--stats", metavar="FILE", type=Path, help="calibration: read from FILE if it exists, else kept there"
    )
    parser.add_argument(
        "--calibrate_batch", metavar="N", type=arguments.positive, default=32, help="training frames to calibrate on"
    )
    parser.add_argument(
        "--calib-pipeline", choices=("train", "test"), default="train", help="test: frames without augmentation"
    )
    parser.add_argument("--method", choices=("mse", "entropy", "percentile", "max"), help="how amax is chosen")
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="YAML recipe: what is quantised, and how")
    parser.add_argument(
        "--disable", metavar="PATTERN", nargs="+", action="extend", default=[], help="layers to leave in float as well"
    )
    parser.add_argument("--allow-partial", action="store_true", help="go on with a checkpoint that lacks weights")
    fixed = {"calibrator": "lean", "weight_method": "max", "percentile": 99.99, "save_every": 50}
    parser.set_defaults(**fixed, save_recipe=None, trust_pickle=False)


def main() -> None:
    """Find frames, quantise, run the trials, rank."""
    args = parse_args()
    common.set_up_logging(args)
    steps = tables.Steps()
    with steps.step("import"), common.importing():
        from lean.files import check_writable
        from lean.lock import sole_writer
        from lean.sensitivity import sensitivity_units
        from qat import ranking
        from qat.journal import Journal
        from qat.preparing import find_frames, open_tables, quantised_model
        from qat.trials import Experiment

    outputs = args.out.with_suffix(".json"), args.out.with_suffix(".csv")
    for output in outputs:
        check_writable(output, "--out")
    reporting.check_report_arguments(args, [args.ckpt])
    cfg = common.load_config(args)
    device = common.choose_device(args.device)
    seed = cfg.get("seed", 0) if args.seed is None else args.seed
    common.make_repeatable(seed, cfg.get("deterministic", False))
    with sole_writer(args.out), hint(args):
        with steps.step("find frames"):
            dataset, indices = find_frames(cfg, args.split, args.frames)
            nuscenes = None if args.metric == "drift" else open_tables(dataset, indices)
        with steps.step("quantise"):
            prepared = quantised_model(cfg, args, device, seed)
            units = sensitivity_units(prepared.model, args.only, PARTS[args.parts])
        experiment = Experiment(prepared.model, units, dataset, indices, PARTS[args.parts])
        about = describe(args, experiment, prepared.made_of)
        print(f"{len(units)} units of {sum(len(unit.layers) for unit in units)} layers on {len(indices)} frames")
        with steps.step("run trials"), Journal(journal_file(args), identity(about), args.resume) as journal:
            experiment.run(journal, common.choose_workers(args.workers, device))
        with steps.step("rank"):
            score = ranking.official_score(experiment, nuscenes) if nuscenes else None
            document = {**about, **ranking.rank(journal, experiment, args.metric, score)}
            write(outputs, document, args)
    print(ranking.table(document, SHOWN))
    print(steps.table())
    print(*(f"wrote {output}" for output in outputs), sep="\n")
    if args.report:
        from qat.sensitivity_report import sections

        recipe = prepared.made_of.get("recipe") or prepared.model.ptq["recipe"]
        settings = {"frames": f"{len(indices)} of {len(dataset)} of {dataset.ann_file}", "parts": args.parts}
        run = reporting.run_entry(steps, device, settings)
        files = reporting.file_entries([args.ckpt])
        found = sections(document, prepared.model, recipe)
        found = {"tables": found["tables"]} if args.add else found  # another model's layers may be in that report
        reporting.write_report(args, reporting.report_of(Path(args.ckpt).stem, run, files=files, **found))


def describe(args: argparse.Namespace, experiment: "Experiment", made_of: Mapping[str, Any]) -> dict[str, Any]:
    """What of the result says how it was made."""
    from lean.bevfusion_recipe import outputs_of
    from lean.calibrate import model_device

    return {
        "format": 1,
        "command": shlex.join(["python", *sys.argv]),
        "config": str(args.config),
        "ckpt": str(args.ckpt),
        "split": args.split,
        "frames": experiment.tokens,
        "parts": args.parts,
        "metric": args.metric,
        "outputs": list(outputs_of(experiment.model)),
        "classes": list(experiment.dataset.CLASSES),
        "device": str(model_device(experiment.model)),
        "made_of": json.loads(json.dumps(made_of)),
    }


def identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What trials depend on: if any of it differs they can't be gone on from."""
    return {key: about[key] for key in ("split", "frames", "parts", "outputs", "device", "made_of")}


def journal_file(args: argparse.Namespace) -> Path:
    """Where the trials of an unfinished run lie, beside its result."""
    return args.out.with_name(f"{args.out.name}.partial.jsonl")


@contextmanager
def hint(args: argparse.Namespace) -> Iterator[None]:
    """Say on interruption how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if journal_file(args).exists():
            print(f"\n{journal_file(args)} keeps the trials: the same command with --resume goes on", file=sys.stderr)
        raise


def write(outputs: Sequence[Path], document: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write the result as JSON and CSV, and remove what an unfinished run keeps."""
    from lean.files import atomic_write
    from qat.collection import partial_file
    from qat.ranking import to_csv

    texts = json.dumps(document, indent=1, allow_nan=False) + "\n", to_csv(document)
    for output, text in zip(outputs, texts, strict=True):
        with atomic_write(output) as file:
            file.write(text.encode())
    for unfinished in (journal_file(args), partial_file(args.out)):
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    common.run(main)
