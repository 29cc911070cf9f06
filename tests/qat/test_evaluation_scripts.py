"""`qat/eval.py` and `qat/show.py` as users run them, on a tiny data set and a small LiDAR model."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bevfusion.config import load_config
from bevfusion.create_data import create_data
from bevfusion.data import load_infos
from bevfusion.errors import InputError
from bevfusion.evaluation import load_submission, save_submission, score_submission, to_submission
from bevfusion.models import build_model
from bevfusion.nuscenes_tables import open_nuscenes
from lean.report.files import read
from qat.inference import ensure_writable, holds_whole_model, load_model, short_names, spread
from tests.bevfusion import tiny_nuscenes as tiny
from tests.bevfusion.detections import CLASSES, perfect

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/nuscenes/det/transfusion/secfpn/lidar/voxelnet_0p075.yaml"
OPTIONS = (
    "point_cloud_range=[-14.4,-14.4,-5,14.4,14.4,3]",
    "model.encoders.lidar.backbone.sparse_shape=[384,384,41]",
    "model.heads.object.num_proposals=20",
)


@pytest.fixture(scope="module")
def cfg():
    return load_config(REPOSITORY / CONFIG, OPTIONS)


@pytest.fixture(scope="module")
def root(tmp_path_factory, cfg) -> Path:
    """A data root with a float checkpoint, the pickle of the same model, and a results file."""
    from mmcv.parallel import MMDataParallel

    folder = tiny.TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(folder, "v1.0-mini", database=False)
    torch.manual_seed(0)
    model = build_model(cfg["model"])
    torch.save({"state_dict": model.state_dict()}, folder / "float.pth")
    torch.save(MMDataParallel(model), folder / "whole.pth")
    frames = load_infos(folder / "nuscenes_infos_val.pkl")[0]
    save_submission(to_submission([perfect(frame) for frame in frames], frames, CLASSES), folder / "results.json")
    return folder


def run(script: str, root: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, f"qat/{script}.py", "--config", CONFIG, "--dataset-root", root, *arguments]
    command += ["--cfg-options", *OPTIONS, "--device", "cpu", "--workers", "0"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


def test_a_pickled_model_gives_the_same_results_as_its_checkpoint(root, cfg, tmp_path):
    outputs = ["--out", tmp_path / "out.json", "--metrics", tmp_path / "metrics.json", "--report", tmp_path / "report"]
    done = run("eval", root, "--ckpt", root / "float.pth", "--compare", root / "whole.pth", "--limit", "2", *outputs)
    assert done.returncode == 0, done.stderr
    assert "2 of the 3 frames" in done.stdout
    first, second = (load_submission(tmp_path / name) for name in ("out.json", "out-compare.json"))
    assert first == second
    frames = load_infos(root / "nuscenes_infos_val.pkl")[0]
    assert list(first["results"]) == [frames[0].token, frames[1].token]
    assert first["meta"] == cfg["input_modality"]
    expected = score_submission(first, open_nuscenes(root, "v1.0-mini")).to_dict()
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"float": expected, "whole": expected}
    report = read(tmp_path / "report")
    assert [(one["role"], one["nds"]) for one in report["scores"]] == [
        ("float", expected["nds"]),
        ("int8", expected["nds"]),
    ]
    assert report["drift"]["groups"][0]["rows"][0]["values"] == [40.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    views = [view for picture in report["pictures"] for view in picture["views"]]
    assert len(views) == 4
    assert all(view["float"] == view["int8"] for view in views)


def test_scoring_a_results_file(root):
    done = run("eval", root, "--results", root / "results.json")
    assert done.returncode == 0, done.stderr
    assert "| mAP [%]      |   30.00 |" in done.stdout
    assert "3 of the 3 frames" in done.stdout


def unknown_token(root: Path, folder: Path) -> list:
    submission = load_submission(root / "results.json")
    submission["results"]["nowhere"] = []
    save_submission(submission, folder / "results.json")
    return ["--results", folder / "results.json"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (lambda root, folder: ["--limit", "0"], "expected a whole number of 1 or more"),
        (lambda root, folder: ["--results", "x", "--compare", "y"], "leave out --compare, --out and --report"),
        (unknown_token, "'nowhere'"),
    ],
)
def test_bad_input_of_eval_is_one_line(root, tmp_path, arguments, line):
    done = run("eval", root, *arguments(root, tmp_path))
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_pictures(root, tmp_path):
    arguments = ["--ckpt", root / "float.pth", "--compare", root / "whole.pth", "--frame", "0", "2", "--score", "0"]
    done = run("show", root, *arguments, "--out", tmp_path / "deep" / "pictures")
    assert done.returncode == 0, done.stderr
    frames = load_infos(root / "nuscenes_infos_val.pkl")[0]
    names = [f"{index:05d}_{frames[index].token}.png" for index in (0, 2)]
    assert sorted(path.name for path in (tmp_path / "deep" / "pictures").iterdir()) == names
    picture = cv2.imread(str(tmp_path / "deep" / "pictures" / names[0]))
    left, right = np.hsplit(picture, 2)
    below = slice(60, None)  # the title names the files
    np.testing.assert_array_equal(left[below], right[below])
    # the images are of one grey each; the title is 44 pixels high, a camera 560 x 315
    assert [np.bincount(left[80:359, x : x + 560].ravel()).argmax() for x in (0, 560, 1120)] == [80, 0, 40]


def test_a_frame_that_does_not_exist_is_refused(root, tmp_path):
    done = run("show", root, "--ckpt", root / "float.pth", "--out", tmp_path, "--frame", "3")
    assert done.returncode == 2
    assert "--frame 3" in done.stderr.splitlines()[-1]
    assert "frames 0 to 2" in done.stderr.splitlines()[-1]


def test_model_files_are_told_apart_without_loading_them(root, tmp_path):
    assert holds_whole_model(root / "whole.pth")
    assert not holds_whole_model(root / "float.pth")
    assert not holds_whole_model(root / "results.json")
    with pytest.raises(InputError, match="checkpoint not found"):
        holds_whole_model(tmp_path / "absent.pth")


def test_a_model_of_unknown_classes_is_refused(root, cfg, tmp_path):
    with zipfile.ZipFile(root / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in whole.namelist():
            old.writestr(name, whole.read(name).replace(b"bevfusion.models.detector", b"bevfusion.models.vanished"))
    with pytest.raises(InputError, match="another version of this project"):
        load_model(cfg, tmp_path / "old.pth", torch.device("cpu"))


def test_a_place_that_cannot_be_written_is_found_early(root, tmp_path):
    ensure_writable(tmp_path / "deep" / "out.json")
    assert not list((tmp_path / "deep").iterdir())
    with pytest.raises(OSError, match=r"float\.pth"):
        ensure_writable(root / "float.pth" / "out.json")


def test_frames_are_spread_evenly():
    assert spread(10, None) == spread(10, 10) == spread(10, 99) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(10, 1) == [0]


def test_names_tell_files_apart():
    assert short_names(["a/float.pth", "b/int8.pth"]) == ["float", "int8"]
    assert short_names(["a/x.pth", "b/x.pth"]) == ["a/x.pth", "b/x.pth"]
    assert short_names(["x.pth", "x.pth"]) == ["x.pth (1)", "x.pth (2)"]
