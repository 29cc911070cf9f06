"""Show what is installed, what it can do on this machine, and the command that mends each problem.

Exit status: 0 if the main job (qat/ptq.py) can run here, 1 if it can't.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder on the path would let our scripts shadow modules

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

from qat.arguments import ArgumentParser
from qat.common import run
from qat.probes import PROBES, Probe
from qat.tables import format_table

LISTS = ROOT / "requirements"
VENV = ROOT / ".venv"


class Skip(Exception):
    """A probe that has no meaning on this machine."""


class Result(NamedTuple):
    """What came of a probe on a device: "ok", "-" (skipped) or "FAILS", and the error's text."""

    probe: Probe
    device: str
    status: str
    detail: str


def run_probes(verbose: bool) -> Iterator[Result]:
    """Try everything in a second process: where a library kills it, the next one goes on behind that place."""
    todo = [(number, device) for number, probe in enumerate(PROBES) for device in probe.devices]
    while todo:
        command = [sys.executable, str(Path(__file__).resolve()), "--probe", json.dumps(todo)]
        stderr = None if verbose else subprocess.DEVNULL
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            for line in process.stdout:
                number, device = todo.pop(0)
                yield Result(PROBES[number], device, *json.loads(line))
        if todo:
            number, device = todo.pop(0)
            yield Result(PROBES[number], device, "FAILS", f"the process died: {_exit_reason(process.returncode)}")


def _exit_reason(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def probe_here(todo: Sequence[tuple[int, str]]) -> None:
    """Try the probes named by `todo` in this process and print one JSON line for each."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    for number, device in todo:
        try:
            if device == "cuda":
                _require_cuda()
            PROBES[number].attempt(device)
            result = ("ok", "")
        except Skip as reason:
            result = ("-", str(reason))
        except Exception as error:
            result = ("FAILS", " ".join(f"{type(error).__name__}: {error}".split())[:200])
        print(json.dumps(result), file=results, flush=True)


def _require_cuda() -> None:
    try:
        import torch
    except Exception:
        raise Skip("torch can't be imported") from None
    if not torch.cuda.is_available():
        raise Skip("torch sees no CUDA device")


class Package(NamedTuple):
    """A package of requirements/: its tested version, the installed one ("": missing), and the stage it belongs to."""

    name: str
    tested: str
    installed: str
    stage: str


def packages() -> list[Package]:
    """Read requirements/*.txt and look up what is installed; of spconv's two builds the installed one, or CPU."""
    stages = {stage: stage for stage in ("torch", "mmcv", "no-deps", "base", "dev")}
    stages["spconv"] = "spconv-cuda" if _version("spconv-cu126") else "spconv-cpu"
    found = []
    for stage, name in stages.items():
        lines = (LISTS / f"{name}.txt").read_text().splitlines()
        pins = (re.match(r"([\w.-]+)==(\S+)", line) for line in lines)
        found += [Package(pin[1], pin[2], _version(pin[1]), stage) for pin in pins if pin]
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def gpus() -> list[str]:
    """Name the GPUs that NVIDIA's driver lists, whatever torch makes of them."""
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID|$)", listing.stdout, re.MULTILINE) if listing.returncode == 0 else []


def show_packages(found: Sequence[Package]) -> None:
    """Print the packages that matter most as a table, the others in a line."""
    main = [package for package in found if package.stage not in ("base", "dev") or package.name in ("numpy", "onnx")]
    rows = [(package.name, package.installed or "missing", package.tested) for package in main]
    print(_table(("package", "installed", "tested"), rows))
    others = [package for package in found if package not in main]
    differing = [f"{p.name} {p.installed} (tested: {p.tested})" for p in others if p.installed not in ("", p.tested)]
    print(f"and {len(others)} others" + (", of which differ: " + ", ".join(differing) if differing else ""))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    try:
        return format_table(headers, rows)
    except ImportError:  # prettytable may be what is missing
        return "\n".join("  ".join(row) for row in [headers, *rows])


def problems(found: Sequence[Package], results: Sequence[Result], able: bool) -> dict[str, list[str]]:
    """Collect what is wrong, by the command that mends it."""
    if not able and Path(sys.prefix).resolve() != VENV.resolve():
        return {f"make setup && {VENV.name}/bin/python qat/doctor.py": ["this Python is not the project's"]}
    wrong: dict[str, list[str]] = {}
    for stage in dict.fromkeys(package.stage for package in found):
        missing = [package.name for package in found if package.stage == stage and not package.installed]
        if missing:
            wrong[f"make setup REPAIR={stage}"] = ["not installed: " + ", ".join(missing)]
    for probe, device, status, detail in results:
        if status == "FAILS":
            remedy = f"make setup REPAIR={probe.stage}"
            wrong.setdefault(remedy, []).append(f"{probe.name} on {device}: {detail}")
    if gpus() and results[0].status == "ok" and main_device(results) == "cpu":
        wrong["update the NVIDIA driver for torch's CUDA version"] = ["torch can't use this machine's GPU"]
    return wrong


def main_device(results: Sequence[Result]) -> str:
    """Name the device that the scripts choose by themselves."""
    return "cuda" if any(r.device == "cuda" and r.status != "-" for r in results) else "cpu"


def main() -> int:
    """Print both tables and the problems; return the exit status."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the libraries print")
    parser.add_argument("--probe", type=json.loads, help=argparse.SUPPRESS)  # the second process
    args = parser.parse_args()
    if args.probe:
        probe_here(args.probe)
        return 0
    print(f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}, {os.cpu_count()} cores")
    print("GPU:", ", ".join(gpus()) or "none")
    found = packages()
    show_packages(found)
    results = list(run_probes(args.verbose))
    print(_table(("ability", "CPU", "GPU"), [_row(probe, results) for probe in PROBES]))
    device = main_device(results)
    needed = {(probe, device if device in probe.devices else "cpu") for probe in PROBES if probe.main_job}
    able = all(r.status == "ok" for r in results if (r.probe, r.device) in needed)
    for remedy, wrong in problems(found, results, able).items():
        print(*(f"problem: {text}" for text in wrong), f"   mend: {remedy}", sep="\n")
    print(f"The main job can{'' if able else 'not'} run here, on the {'GPU' if device == 'cuda' else 'CPU'}.")
    return 0 if able else 1


def _row(probe: Probe, results: Sequence[Result]) -> tuple[str, str, str]:
    status = {r.device: r.status for r in results if r.probe is probe}
    return probe.name, status["cpu"], status.get("cuda", "")


if __name__ == "__main__":
    run(main)
