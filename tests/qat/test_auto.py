"""`qat/ptq.py --auto` and the improvements, on a tiny data set and a small LiDAR model."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from bevfusion.config import load_config
from bevfusion.create_data import create_data
from bevfusion.models import build_model
from lean.mixed import Attempt, Candidate, Choice
from lean.switches import quantized_layers
from qat.auto import Result
from qat.judge import split_frames
from tests.bevfusion import tiny_nuscenes as tiny
from tests.conftest import ROOT
from tests.qat.ptq_samples import Outcome, run_here
from tests.qat.test_evaluation_scripts import CONFIG, OPTIONS

ALWAYS_FLOAT = {"encoders.lidar.backbone.conv_input.0", "decoder.neck.deblocks.0.0"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data root of three training and three validation frames with a float checkpoint and saved statistics."""
    folder = tiny.TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(folder, "v1.0-mini", database=False)
    torch.manual_seed(0)
    model = build_model(load_config(ROOT / CONFIG, OPTIONS)["model"])
    torch.save({"state_dict": model.state_dict()}, folder / "float.pth")
    done = ptq(folder, folder / "base.pth", "--stats", folder / "stats.npz", statistics=False)
    assert done.status == 0, done.err
    return folder


def ptq(root: Path, save: Path, *more: object, statistics: bool = True) -> Outcome:
    common = ["--ckpt", root / "float.pth", "--dataset-root", root, "--device", "cpu", "--workers", 0, "--save", save]
    data = ["--from-stats", root / "stats.npz"] if statistics else ["--calib-pipeline", "test", "--calibrate_batch", 2]
    return run_here(
        "--config", ROOT / CONFIG, *common, *data, *more, "--no-verify", "--no-checks", "--cfg-options", *OPTIONS
    )


def layers_of(path: Path) -> dict[str, torch.nn.Module]:
    return quantized_layers(torch.load(path, weights_only=False).module)


def in_float(path: Path) -> set[str]:
    return {name for name, layer in layers_of(path).items() if layer.is_disabled}


def test_a_target_that_is_met_leaves_the_recipe_as_it_is(root, tmp_path):
    done = ptq(root, tmp_path / "ptq.pth", "--auto", "--auto-frames", 2)  # a random model finds nothing to lose
    assert done.status == 0, done.err
    assert "searched on 1 frames" in done.out and "verified on 2 others" in done.out
    assert "none: the target is met without" in done.out
    assert in_float(tmp_path / "ptq.pth") == ALWAYS_FLOAT


def test_an_unreachable_target_says_how_far_it_came_and_writes_the_recipe(root, tmp_path):
    options = ["--auto", "--auto-frames", 1, "--metric", "drift", "--max-drop", 0, "--budget-int8", 0.9]
    done = ptq(root, tmp_path / "ptq.pth", *options)
    assert done.status == 0, done.err
    assert "--auto: the target was not met" in done.err
    assert "NOT met" in done.out
    chosen = in_float(tmp_path / "ptq.pth")
    found = torch.load(tmp_path / "ptq.pth", weights_only=False).module.ptq["auto"]
    assert set(found["layers"]) == chosen - ALWAYS_FLOAT
    assert 0.9 <= found["share"][1] <= found["share"][0]  # equal if no set of layers was measured to help
    assert 0 < found["searched"][1] <= found["searched"][0]
    assert not found["kept"]
    recipe = tmp_path / "ptq.recipe.yaml"
    assert recipe.read_text().startswith("# found by qat/ptq.py --auto\n")
    disabled = yaml.safe_load(recipe.read_text())["disable"]
    assert [name for name in disabled if "*" not in name] == ["decoder.neck.deblocks.0.0", *found["layers"]]


def test_layers_that_help_only_where_they_were_searched_for_are_not_used():
    layers = Candidate(("a", "b"), 1.0)
    choice = Choice(Attempt((layers,), 0.1), True, (Attempt((), 2.0), Attempt((layers,), 0.1)))
    base = {"metric": "mAP", "target": 0.2, "frames": (4, 4), "choice": choice, "slower": 0.01, "seconds": 9.0}
    shares = {"share": (0.99, 0.96), "share_of_all": (0.8, 0.7)}
    met = Result(**base, **shares, verified=(1.0, 0.2))
    assert (met.kept, met.layers) == (True, ("a", "b"))
    assert "0.2 points of mAP: met" in met.describe() and "as well: a, b" in met.describe()
    closer = Result(**base, **shares, verified=(1.0, 0.5))
    assert (closer.kept, closer.layers) == (False, ("a", "b"))
    assert "NOT met" in closer.describe()
    useless = Result(**base, **shares, verified=(1.0, 1.1))
    assert (useless.kept, useless.layers, useless.to_dict()["layers"]) == (False, (), [])
    assert "none: a, b helped on the frames searched on, but not on the others" in useless.describe()


def test_improvements_change_the_parameters_of_int8_layers_alone(root, tmp_path):
    data = {"statistics": False}
    done = ptq(root, tmp_path / "ptq.pth", "--adaround", 2, "--bias-correction", **data)
    assert done.status == 0, done.err
    before, after = (layers_of(path) for path in (root / "base.pth", tmp_path / "ptq.pth"))
    weighted = {name for name, layer in after.items() if hasattr(layer, "weight")}
    changed = {name for name in weighted if not torch.equal(after[name].weight, before[name].weight)}
    shifted = {name for name in weighted if not torch.equal(after[name].bias, before[name].bias)}
    record = torch.load(tmp_path / "ptq.pth", weights_only=False).module.ptq
    assert changed == set(record["adaround"]) and len(changed) == 2
    assert shifted == weighted - ALWAYS_FLOAT == set(record["bias_correction"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auto", "--max-drop", "-1"], "--max-drop: expected a number of 0 or more, got '-1'"),
        (["--auto", "--max-drop", "nan"], "--max-drop: expected a number of 0 or more, got 'nan'"),
        (["--auto", "--budget-int8", "95"], "--budget-int8: expected a number from 0 to 1, got '95'"),
        (["--auto", "--auto-frames", "0"], "--auto-frames"),
        (["--auto", "--metric", "map"], "--metric"),
        (["--max-drop", "0.1"], "--max-drop is of use with --auto only"),
        (["--bias-correction"], "--from-stats runs no calibration frames, which --bias-correction needs"),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_options_that_can_not_be_used(root, tmp_path, arguments, message):
    done = ptq(root, tmp_path / "ptq.pth", *arguments)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_a_metric_that_needs_annotations_says_so(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "nuscenes")
    infos = copy / "nuscenes_infos_val.pkl"
    content = pickle.loads(infos.read_bytes())
    for info in content["infos"]:
        del info["gt_boxes"]
    infos.write_bytes(pickle.dumps(content))
    done = ptq(copy, tmp_path / "ptq.pth", "--auto")
    assert done.status == 2
    assert "need ground truth" in done.err and "use --metric drift" in done.err
    assert not (tmp_path / "ptq.pth").exists()


def test_a_scene_is_searched_on_or_verified_on():
    scenes = [f"scene{i // 10}" for i in range(60)]
    search, verify = split_frames(scenes, 12, 0)
    assert len(search) == len(verify) == 12
    assert {scenes[i] for i in search}.isdisjoint(scenes[i] for i in verify)
    assert len({scenes[i] for i in search}) == 3
    assert split_frames(scenes, 12, 0) == (search, verify) != split_frames(scenes, 12, 1)
    assert split_frames(["a"] * 5, 9, 0) == ([0, 1], [2, 3, 4])
    assert split_frames(["a"], 9, 0) == ([], [0])
