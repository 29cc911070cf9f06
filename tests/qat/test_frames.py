"""The choice of calibration frames."""

import json
import logging

import pytest

from bevfusion.config import load_config
from qat.arguments import DEFAULT_CONFIG
from qat.frames import choose_frames
from tests.conftest import ROOT
from tests.qat.ptq_samples import link_frame, options


@pytest.fixture
def root(tmp_path, realframe, golden):
    return link_frame(tmp_path / "nuscenes", realframe, golden, frames=3)


def described(root) -> str:
    return choose_frames(load_config(ROOT / DEFAULT_CONFIG, options(root)), "test", 2, 0).describe()


def test_validation_frames_are_counted(root):
    assert "training frames: 3" in described(root)
    assert "validation frames: 3" in described(root)


def test_validation_frames_that_cannot_be_read_stop_nothing(root, caplog):
    (root / "nuscenes_infos_val.json").write_text(json.dumps({"infos": [], "metadata": {}}))
    with caplog.at_level(logging.WARNING, logger="qat.frames"):
        assert "validation frames: unknown" in described(root)
    assert "lists no frames" in caplog.text


def test_no_validation_file_is_no_news(root, caplog):
    (root / "nuscenes_infos_val.json").unlink()
    with caplog.at_level(logging.WARNING, logger="qat.frames"):
        assert "validation frames: unknown" in described(root)
    assert "validation" not in caplog.text
