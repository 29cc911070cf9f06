"""Fixtures shared by all tests: where the reference data lies, and what this machine has."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _folder(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"reference data not found: {path}")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the reference outputs of the original BEVFusion."""
    return _folder("golden")


@pytest.fixture(scope="session")
def realframe() -> Path:
    """Folder with one real nuScenes keyframe."""
    return _folder("realframe")
