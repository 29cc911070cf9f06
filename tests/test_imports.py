"""Imports run one way: qat -> lean and bevfusion, which don't know each other; and leave other packages as they are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORBIDDEN = {"bevfusion": {"lean", "qat", "pytorch_quantization"}, "lean": {"bevfusion", "qat", "mmcv", "mmdet3d"}}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported_packages(f) & FORBIDDEN[package])}
    assert not wrong


def test_importing_us_leaves_their_registries_as_they_are():
    code = """
import mmcv
actual = mmcv.__version__
mmcv.__version__ = "1.7.0"
import mmdet3d.models, mmdet3d.datasets
mmcv.__version__ = actual
from mmcv.cnn import MODELS as MMCV
from mmdet.models.builder import MODELS as MMDET
from mmdet3d.datasets.builder import DATASETS, PIPELINES
from mmdet3d.models.builder import MODELS
theirs = (MMCV, MMDET, MODELS, DATASETS, PIPELINES)
before = [dict(registry.module_dict) for registry in theirs]
import bevfusion.models, bevfusion.data
for registry, known in zip(theirs, before):
    assert all(registry.module_dict[name] is cls for name, cls in known.items())
    assert not [cls for cls in registry.module_dict.values() if cls.__module__.startswith("bevfusion")]
from bevfusion.registry import MODELS as OURS
assert OURS.module_dict["ResNet"] is not MMDET.module_dict["ResNet"]
assert mmcv.__version__ == actual
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


def test_the_synthetic_world_needs_neither_torch_nor_mmdet3d():
    code = "import sys, bevfusion.synthetic; print(*{'torch', 'mmcv', 'mmdet3d'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == []


def scripts() -> list[Path]:
    return [path for path in sorted((ROOT / "qat").glob("*.py")) if "sys.path[0] =" in path.read_text()]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_scripts_leave_their_folder_before_they_import_anything_that_it_could_hide(script):
    """`qat/inspect.py` would be imported in place of the standard library's, by `dataclasses` for one."""
    lines = script.read_text().splitlines()
    before = lines[: next(i for i, line in enumerate(lines) if line.startswith("sys.path[0] ="))]
    assert [line for line in before if line.startswith(("import ", "from "))] == [
        "import sys",
        "from pathlib import Path",
    ]


def test_every_script_that_is_run_by_its_path_leaves_its_folder():
    main = [path for path in (ROOT / "qat").glob("*.py") if "__main__" in path.read_text()]
    assert {path.name for path in main} - {path.name for path in scripts()} == {"verification.py"}  # run with -m
