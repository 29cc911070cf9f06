"""The doctor tells what works, survives what doesn't, and names the command that mends it."""

import os
import subprocess
import sys
from pathlib import Path

from qat import doctor
from qat.probes import PROBES

ROOT = Path(__file__).resolve().parents[2]


def examine(*arguments: str, shadow: Path | None = None) -> subprocess.CompletedProcess:
    """Run the doctor in a process of its own; modules in the folder `shadow` come before the installed ones."""
    environment = os.environ | ({"PYTHONPATH": str(shadow)} if shadow else {})
    command = [sys.executable, "qat/doctor.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def rows(text: str) -> dict[str, list[str]]:
    """Map the first cell of each table row to the others."""
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|")
    return {first: rest for first, *rest in cells}


def results(**failures: str) -> list[doctor.Result]:
    """Make up results: all well, but for the attempts named, as `function_device`, with the error's text."""
    made = []
    for probe in PROBES:
        for device in probe.devices:
            detail = failures.get(f"{probe.attempt.__name__}_{device}", "")
            status = "-" if detail == "skipped" else "FAILS" if detail else "ok"
            made.append(doctor.Result(probe, device, status, detail))
    return made


def test_everything_works_here():
    result = examine()
    assert result.returncode == 0, result.stdout
    assert result.stderr == ""
    table = rows(result.stdout)
    for probe in PROBES:
        assert table[probe.name][0] == "ok", result.stdout
    assert "missing" not in (table["torch"][0], table["mmdet3d"][0], table["pytorch-quantization"][0])
    assert "The main job can run here" in result.stdout


def test_a_crash_and_a_missing_module_are_told_and_the_rest_is_tried(tmp_path):
    (tmp_path / "pytorch_quantization.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "onnxruntime.py").write_text("print('noise'); raise ModuleNotFoundError('no such luck')")
    result = examine(shadow=tmp_path)
    assert result.returncode == 1
    table = rows(result.stdout)
    assert table["pytorch-quantization: fake quantisation"][0] == "FAILS"
    assert table["onnxruntime: one-node graph"][0] == "FAILS"
    assert table["mmcv operators: voxelisation"][0] == table["mmdet3d: import"][0] == "ok"
    lines = result.stdout.splitlines()
    crash = lines.index("problem: pytorch-quantization: fake quantisation on cpu: the process died: SIGSEGV")
    assert "   mend: make setup REPAIR=no-deps" in lines[crash:]
    missing = lines.index("problem: onnxruntime: one-node graph on cpu: ModuleNotFoundError: no such luck")
    assert lines[missing + 1] == "   mend: make setup REPAIR=base"
    assert lines[-1].startswith("The main job cannot run here")
    assert result.stderr == ""
    assert "noise" not in result.stdout


def test_bad_usage_is_status_2():
    result = examine("--nope")
    assert (result.returncode, result.stderr) == (2, "error: unrecognized arguments: --nope (see --help)\n")


def test_missing_packages_are_grouped_by_the_stage_that_installs_them(monkeypatch):
    monkeypatch.setattr(doctor, "VENV", Path(sys.prefix))
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in ("scipy", "tqdm", "ruff") else "1.0")
    found = doctor.packages()
    assert {package.stage for package in found} == {"torch", "mmcv", "no-deps", "base", "dev", "spconv"}
    assert doctor.problems(found, results(), able=True) == {
        "make setup REPAIR=base": ["not installed: scipy, tqdm"],
        "make setup REPAIR=dev": ["not installed: ruff"],
    }


def test_another_python_is_sent_to_the_projects_own(monkeypatch):
    monkeypatch.setattr(doctor, "VENV", ROOT / "elsewhere")
    wrong = doctor.problems([], results(torch_convolution_cpu="no torch"), able=False)
    assert wrong == {"make setup && elsewhere/bin/python qat/doctor.py": ["this Python is not the project's"]}
    assert doctor.problems([], results(), able=True) == {}


def test_operators_without_cuda_are_installed_again():
    wrong = doctor.problems([], results(voxelisation_cuda="not compiled with GPU support"), able=True)
    assert wrong == {"make setup REPAIR=mmcv": ["mmcv operators: voxelisation on cuda: not compiled with GPU support"]}


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "gpus", lambda: ["NVIDIA H100"])
    probes = ("torch_convolution", "sparse_convolution", "voxelisation", "fake_quantisation")
    unseen = results(**{f"{probe}_cuda": "skipped" for probe in probes})
    assert list(doctor.problems([], unseen, able=True).values()) == [["torch can't use this machine's GPU"]]
    assert doctor.problems([], results(), able=True) == {}


def test_gpus_are_named_as_the_driver_lists_them(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    listing = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: M)"
    tool.write_text(f"#!/bin/sh\necho '{listing}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.gpus() == ["NVIDIA H100 80GB HBM3"]
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert doctor.gpus() == []


def test_tables_are_legible_without_prettytable(monkeypatch):
    monkeypatch.setitem(sys.modules, "prettytable", None)
    assert doctor._table(("a", "b"), [("1", "2")]) == "a  b\n1  2"
