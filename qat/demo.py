"""The whole tool on a small synthetic world: quantise the demo model, score it against the float one, draw frames.

Every step is a command that you can run yourself; it is printed before it runs, and skipped when what it makes is newer
than what it is made from.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide the standard library's

import argparse
import json
import shlex
import subprocess
from dataclasses import dataclass

from qat import arguments, common, tables

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/demo/camera+lidar/resnet50.yaml")
FLOAT = Path("model/demo/bevfusion-demo.pth")
REPORT_FRAMES = 2
SEED = 7  # not the training world's: some scene names are the same


@dataclass(frozen=True)
class Step:
    """A command, the files it makes, and the files it makes them from."""

    title: str
    command: tuple[str, ...]
    makes: tuple[Path, ...]
    needs: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        """Whether everything it makes is there, and newer than everything it is made from."""
        if not all(path.exists() for path in self.makes):
            return False
        oldest = min(path.stat().st_mtime for path in self.makes)
        return all(path.stat().st_mtime <= oldest for path in self.needs)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = arguments.ArgumentParser(__doc__)
    parser.add_argument("--data", metavar="DIR", type=Path, default=Path("data/demo"), help="folder of the world")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="folder of the results")
    parser.add_argument("--scenes", metavar="N", type=arguments.positive, default=4, help="training scenes, at most 8")
    parser.add_argument(
        "--frames", metavar="N", type=arguments.positive, default=20, help="keyframes a scene, at most 40"
    )
    parser.add_argument("--batches", metavar="N", type=arguments.positive, default=40, help="frames to calibrate on")
    parser.add_argument("--limit", metavar="N", type=arguments.positive, default=40, help="validation frames to score")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    arguments.add_logging_arguments(parser)
    return parser.parse_args()


def plan(args: argparse.Namespace) -> list[Step]:
    """Lay out the steps of the demonstration."""
    world, out = args.data, args.out
    infos = (world / "nuscenes_infos_train.pkl", world / "nuscenes_infos_val.pkl")
    int8, scores, pictures = out / "bevfusion_ptq.pth", out / "scores.json", out / "pictures"
    report = out / "report"
    python = (sys.executable, "-W", "ignore")
    model = ("--config", str(CONFIG), "--dataset-root", str(world), "--device", args.device)
    both = ("--ckpt", str(FLOAT), "--compare", str(int8))
    size = ("--scenes", str(args.scenes), "--frames", str(args.frames), "--image-size", "480x270", "--seed", str(SEED))
    frames = [str(args.limit * part // 4) for part in range(1, 4)]
    quantise = ("--ckpt", str(FLOAT), "--calibrate_batch", str(args.batches), "--save", str(int8))
    describe = ("--report", str(report), "--force", "--report-frames", str(REPORT_FRAMES))
    return [
        Step(
            "make a world",
            (*python, "-m", "bevfusion.synthetic", "--out", str(world), "--version", "v1.0-mini", *size),
            (world / "v1.0-mini" / "sample.json",),
        ),
        Step(
            "write its info files",
            (*python, "-m", "bevfusion.create_data", "--root", str(world), "--version", "v1.0-mini", "--no-database"),
            infos,
            (world / "v1.0-mini" / "sample.json",),
        ),
        Step(
            "quantise",
            (*python, "qat/ptq.py", *model, *quantise, *describe),
            (int8, report / "report.json"),
            (FLOAT, *infos[:1]),
        ),
        Step(
            "score both models",
            (
                *(*python, "qat/eval.py", *model, *both, "--limit", str(args.limit), "--metrics", str(scores)),
                *("--report", str(report), "--add"),
            ),
            (scores, report / "index.html"),
            (int8, *infos[1:]),
        ),
        Step(
            "draw frames",
            (*python, "qat/show.py", *model, *both, "--out", str(pictures), "--frame", *frames),
            (pictures,),
            (int8,),
        ),
    ]


def summary(args: argparse.Namespace) -> str:
    """Lay out what the demonstration found, and what to try next."""
    out = args.out
    scores = json.loads((out / "scores.json").read_text())
    (_, float_scores), (_, int8_scores) = scores.items()
    rows = []
    for name, key in (("mAP [%]", "mean_ap"), ("NDS [%]", "nds")):
        before, after = 100 * float_scores[key], 100 * int8_scores[key]
        rows.append((name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"))
    table = tables.format_table(("metric", "FP32", "INT8", "difference"), rows, ("FP32", "INT8", "difference"))
    sizes = [tables.sized(path) for path in (FLOAT, out / "bevfusion_ptq.pth")]
    return "\n".join(
        [
            table,
            f"float model:     {sizes[0]}",
            f"quantised model: {sizes[1]}",
            f"scores:          {out / 'scores.json'}",
            f"pictures:        {out / 'pictures'}",
            f"report:          {out / 'report' / 'index.html'} (open it in a browser)",
            "next: your own checkpoint: .venv/bin/python qat/ptq.py --config … --ckpt … --dataset-root …",
            f"      its ONNX files:      .venv/bin/python qat/export.py --ckpt {out / 'bevfusion_ptq.pth'}",
        ]
    )


def main() -> int | None:
    """Run the steps that are not done yet, then sum up."""
    args = parse_arguments()
    common.set_up_logging(args)
    steps = tables.Steps()
    args.out.mkdir(parents=True, exist_ok=True)
    for step in plan(args):
        if step.done:
            print(f"== {step.title}: done before", flush=True)
            continue
        print(f"== {step.title}\n$ {shlex.join(step.command)}", flush=True)
        with steps.step(step.title):
            status = subprocess.run(step.command, cwd=ROOT).returncode
        if status:
            return status
    print(steps.table(), summary(args), sep="\n")
    return None


if __name__ == "__main__":
    common.run(main)
