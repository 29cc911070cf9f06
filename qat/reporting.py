"""`--report DIR` of the scripts: its options, and putting a report together."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat import arguments, common, tables

if TYPE_CHECKING:
    import torch

    from bevfusion.data import NuScenesDataset
    from bevfusion.evaluation import DetectionScores

FRAMES = 4


def add_report_arguments(parser: argparse.ArgumentParser, frames: bool = True, add: bool = True) -> None:
    """Add --report and what goes with it.

    Args:
        frames: the script runs frames of its own for the report.
        add: it describes a model that was there before, so that there may be a report on it.
    """
    parser.add_argument("--report", metavar="DIR", type=Path, help="write a report there: index.html and report.json")
    parser.add_argument("--force", action="store_true", help="replace a report that is in DIR")
    if add:
        parser.add_argument("--add", action="store_true", help="add to the report that is in DIR, of the same model")
    else:
        parser.set_defaults(add=False)
    if frames:
        parser.add_argument(
            "--report-frames",
            metavar="N",
            type=arguments.natural,
            default=FRAMES,
            help="frames that the report's SQNR, drift and pictures come from; 0: none",
        )


def check_report_arguments(args: argparse.Namespace, models: Sequence[str] = ()) -> None:
    """Refuse, before the long part of a run, a folder that the report can't be written to.

    Args:
        models: files that the report is on.

    Raises:
        UsageError: options that don't go together.
        InputError: there is no such model file.
        QuantizationError: see `lean.report.files.check_folder`; or --add, and the report there is of another model.
    """
    if args.report is None:
        if args.force or args.add:
            raise common.UsageError(f"{'--force' if args.force else '--add'} says what to do with --report DIR: add it")
        return
    if args.force and args.add:
        raise common.UsageError("--force replaces the report and --add keeps it: leave out one of them")
    from lean.report.files import check_folder

    check_folder(args.report, force=args.force, add=args.add)
    if args.add:
        from lean.report.files import read
        from lean.report.merge import refuse_other_model

        refuse_other_model(read(args.report), {"files": file_entries(models)})


def write_report(args: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """Write a report to `args.report`, added to the one that is there with --add, and say where it is.

    Raises:
        QuantizationError: the report that is there is of another model, or the folder can't be written to.
    """
    from lean.report.files import PAGE, read, write
    from lean.report.merge import merge

    write(args.report, merge(read(args.report), report) if args.add else report)
    print(f"report: {args.report / PAGE}")


def report_of(title: str, run: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """A report of one run; `sections` as in `lean.report.schema`."""
    from lean.report.schema import FORMAT, VERSION

    return {"format": FORMAT, "version": VERSION, "title": title, "runs": [dict(run)], **sections}


def run_entry(steps: tables.Steps, device: "torch.device", settings: Mapping[str, object]) -> dict[str, Any]:
    """How this process was run: command, times so far, device, versions; `settings`: in words."""
    import torch

    from qat.calibration import versions

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return {
        "script": f"qat/{Path(sys.argv[0]).name}",
        "command": shlex.join(["python", *sys.argv]),
        "device": name,
        "steps": [{"name": step, "seconds": seconds, "peak_mib": peak} for step, seconds, peak in steps.rows],
        "versions": versions(),
        "settings": {key: str(value) for key, value in settings.items()},
    }


def file_entry(role: str, path: str | Path) -> dict[str, Any]:
    """A model file (`role`: float or int8), with its checksum."""
    from lean.files import digest

    return {"role": role, "name": str(path), "bytes": Path(path).stat().st_size, "sha256": digest(path)}


def file_entries(files: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of one or two model files; raises as `roles_of` does."""
    return [file_entry(role, path) for role, path in zip(roles_of(files), files, strict=True)]


def roles_of(files: Sequence[str]) -> list[str]:
    """Whether each of one or two model files is the `float` or the `int8` one.

    Raises:
        UsageError: there are two of a kind.
        InputError: there is no such file.
    """
    from qat.inference import holds_whole_model

    roles = ["int8" if holds_whole_model(file) else "float" for file in files]
    if len(set(roles)) < len(roles):
        raise common.UsageError(
            f"--report sets a quantised model beside its float one, but {' and '.join(files)} are both {roles[0]}"
        )
    return roles


def report_scores(
    args: argparse.Namespace,
    scores: "Mapping[str, DetectionScores]",
    results: Sequence[Sequence[Mapping]],
    files: Mapping[str, str],
    dataset: "NuScenesDataset",
    frames: Sequence[int],
    device: "torch.device",
    steps: tables.Steps,
) -> None:
    """Write the report of an evaluation: scores, and of two models the drift of the boxes and pictures.

    Args:
        scores, results: of each model, in the order of `files`, role (see `roles_of`) -> path.

    Raises:
        InputError: a frame can't be read.
        QuantizationError: the folder can't be written to.
    """
    from qat.findings import detections

    sections: dict[str, Any] = {}
    if len(files) == 2:
        by_role = dict(zip(files, results, strict=True))
        with steps.step("report"):
            sections = detections(dataset, frames, by_role["float"], by_role["int8"])
    settings = {"frames": f"{len(frames)} of {len(dataset)} of {dataset.ann_file}", "config": args.config}
    scored = zip(files, scores.items(), strict=True)
    sections["scores"] = [{"name": name, "role": role, **one.to_dict()} for role, (name, one) in scored]
    sections["files"] = [file_entry(role, path) for role, path in files.items()]
    title = Path(files.get("int8", files.get("float", ""))).stem
    write_report(args, report_of(title, run_entry(steps, device, settings), **sections))
