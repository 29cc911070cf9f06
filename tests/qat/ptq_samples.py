"""A data root with the real keyframe, and a reduced camera+LiDAR model, for the tests of `qat/ptq.py`."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from bevfusion.config import load_config
from bevfusion.models import build_model
from qat import arguments, common, ptq
from tests.bevfusion.data_samples import reference_info, write_infos
from tests.conftest import ROOT

REDUCED = (
    "image_size=[64,176]",
    "point_cloud_range=[-14.4,-14.4,-5,14.4,14.4,3]",
    "model.encoders.lidar.backbone.sparse_shape=[384,384,41]",
    "model.encoders.camera.vtransform.xbound=[-14.4,14.4,0.3]",
    "model.encoders.camera.vtransform.ybound=[-14.4,14.4,0.3]",
    "model.encoders.camera.backbone.base_channels=8",
    "model.encoders.camera.neck.in_channels=[64,128,256]",
    "model.heads.object.num_proposals=20",
)


class Outcome(NamedTuple):
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


def link_frame(root: Path, realframe: Path, golden: Path, frames: int = 1) -> Path:
    """Make `root` a data root whose training and validation frames are `frames` times the real keyframe."""
    root.mkdir(parents=True)
    for file in realframe.iterdir():
        (root / file.name).symlink_to(file)
    infos = [{**reference_info(golden), "token": f"{i:032x}", "scene_token": f"scene{i % 3}"} for i in range(frames)]
    for split in ("train", "val"):
        write_infos(root / f"nuscenes_infos_{split}.json", infos)
    return root


def options(root: Path, reduced: bool = True) -> list[str]:
    """Values of `--cfg-options` for a root of `link_frame`: its info files are JSON."""
    files = [f"data.{part}={root}/nuscenes_infos_{s}.json" for part, s in FILES]
    return [*files, *(REDUCED if reduced else ())]


def with_reduced_model(root: Path) -> Path:
    """Put the reduced model's checkpoint with random weights, `float.pth`, into a root of `link_frame`."""
    torch.manual_seed(0)
    model = build_model(load_config(ROOT / arguments.DEFAULT_CONFIG, options(root)).model)
    torch.save({"state_dict": model.state_dict()}, root / "float.pth")
    return root


NO_VERIFY = ("--no-verify",)
FILES = (("train.dataset.ann_file", "train"), ("val.ann_file", "val"), ("test.ann_file", "val"))


def run_here(*arguments: object, verify: bool = False) -> Outcome:
    """Run `qat/ptq.py` in this process, which spares its imports; `verify`: let it start a fresh one at its end."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["ptq.py", *map(str, arguments), *NO_VERIFY[verify:]]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        common.run(ptq.main)
    return Outcome(stopped.value.code or 0, out.getvalue(), err.getvalue())


def edit_infos(path: Path, change) -> None:
    """Rewrite the info file at `path` with every info passed through `change`."""
    content = json.loads(path.read_text())
    content["infos"] = [change(info) for info in content["infos"]]
    path.write_text(json.dumps(content))


def expect_refusal(done: Outcome, *words: str) -> None:
    """Assert status 2 and one line on stderr that holds these words."""
    assert done.status == 2, done.out + done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in lines[0], lines[0]
