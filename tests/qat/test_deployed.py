"""The exported files of a small model, put together, against the model itself; and `qat/eval.py --onnx`."""

import copy
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mmcv.parallel import MMDataParallel

from bevfusion.config import load_config
from bevfusion.create_data import create_data
from bevfusion.errors import InputError
from bevfusion.evaluation.drift import Boxes, match, pair_differences
from lean.errors import QuantizationError
from lean.export import dump
from lean.export.dense import DenseOptions, export_camera, export_transfuser
from lean.export.rounding import round_to_file
from lean.export.sparse import export_lidar
from lean.export.stages import CAMERA, FUSER, HEAD, LIDAR, STAGES, TRANSFORM, FileStages
from lean.switches import disable_quantization
from qat import arguments
from qat.deployed import dump_frame, in_stages, open_files
from qat.exporting import example_voxels
from tests.bevfusion import tiny_nuscenes as tiny
from tests.conftest import ROOT
from tests.lean.export.samples import distance, reduced_batch, reduced_ptq
from tests.qat.ptq_samples import REDUCED, expect_refusal
from tests.qat.scripts import run_script

WEAK_FLOAT = DenseOptions("weak", fp16=True, layernorm_plugin=True)
STRONG_FLOAT = DenseOptions("strong", fp16=True)
WEAK = DenseOptions("weak")


@pytest.fixture(scope="module")
def cfg():
    return load_config(ROOT / arguments.DEFAULT_CONFIG, list(REDUCED))


@pytest.fixture(scope="module")
def model(golden):
    """The small quantised model, its LiDAR branch with the numbers of the file."""
    model = reduced_ptq(golden)
    round_to_file(model.encoders["lidar"]["backbone"])
    model.encoders["lidar"]["voxelize"].half_features = True
    return model


@pytest.fixture(scope="module")
def frame(golden):
    return reduced_batch(golden)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Write (once) the files of a form, and return their folder."""
    done = {}

    def write(options: DenseOptions) -> Path:
        if options not in done:
            done[options] = tmp_path_factory.mktemp("onnx")
            export_camera(model, done[options], options)
            export_transfuser(model, done[options], options)
            file = done[options] / "lidar.backbone.xyz.onnx"
            export_lidar(model.encoders["lidar"]["backbone"], file, voxels=example_voxels(model), fp16=options.fp16)
        return done[options]

    return write


@pytest.fixture(scope="module")
def reference(model, frame):
    """Inputs and outputs of all stages of the model, by name."""
    pipeline = in_stages(model)
    pipeline.stages.recorded = recorded = {}
    pipeline(**frame)
    return recorded


@pytest.mark.parametrize(
    ("options", "centre", "score"), [(WEAK_FLOAT, 1e-4, 1e-6), (STRONG_FLOAT, 0.05, 1e-3)], ids=["weak", "strong"]
)
def test_float_files_find_what_the_float_model_finds(cfg, model, frame, folder, options, centre, score):
    files = open_files(cfg, folder(options), integer=options.typing == "strong")
    with torch.no_grad(), disable_quantization(model):
        expected = Boxes.of(model(**frame)[0])
    found = Boxes.of(files(**frame)[0])
    pairs = match(expected, found)
    assert len(pairs[0]) == len(expected.boxes) == len(found.boxes) == 20
    differences = pair_differences(
        *(Boxes(*(x[rows] for x in b)) for b, rows in zip((expected, found), pairs, strict=True))
    )
    assert differences["centre"].max() < centre
    assert differences["score_change"].max() < score
    assert differences["size"].max() < 0.02
    assert differences["yaw"].max() < 0.02


def test_the_model_in_stages_is_the_model(model, frame):
    with torch.no_grad():
        expected = model(**frame)[0]
    actual = in_stages(model)(**frame)[0]
    assert torch.equal(actual["labels_3d"], expected["labels_3d"])
    torch.testing.assert_close(actual["boxes_3d"].tensor, expected["boxes_3d"].tensor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual["scores_3d"], expected["scores_3d"], rtol=1e-4, atol=1e-6)


# Rounding flips add up within the dense files; each of their layers is compared elsewhere.
@pytest.mark.parametrize(
    ("stage", "tolerance"), [(CAMERA, 0.03), (TRANSFORM, 1e-5), (LIDAR, 5e-4), (FUSER, 0.03), (HEAD, 1e-3)]
)
def test_int8_files_equal_the_model_stage_by_stage(folder, reference, stage, tolerance):
    given = {name.removeprefix(f"{stage}."): x for name, x in reference.items() if name.startswith(f"{stage}.")}
    outputs = {f"{stage}.{name}": x for name, x in FileStages(folder(WEAK)).run(stage, **given).items()}
    for difference in dump.compare({name: reference[name] for name in outputs}, outputs):
        assert difference.relative < tolerance, difference


def test_the_order_of_the_axes_changes_nothing(model, reference, folder, tmp_path):
    for file in folder(WEAK).iterdir():
        if not file.name.startswith(LIDAR):
            (tmp_path / file.name).symlink_to(file)
    backbone = model.encoders["lidar"]["backbone"]
    voxels = example_voxels(model)
    export_lidar(backbone, tmp_path / f"{LIDAR}.zyx.onnx", voxels=voxels, fp16=False, inverse=True)
    inputs = {name: reference[f"{LIDAR}.{name}"] for name in ("features", "coordinates")}
    stages = FileStages(tmp_path), FileStages(folder(WEAK))
    assert stages[0].grid == stages[1].grid
    xyz, zyx = (each.run(LIDAR, **inputs)["lidar"] for each in stages)
    np.testing.assert_array_equal(xyz, zyx)


def test_a_dump_holds_every_stage_and_comes_back(cfg, frame, folder, tmp_path, capsys):
    pipeline = open_files(cfg, folder(WEAK_FLOAT), integer=False, half_points=True)
    dump_frame(pipeline, frame, tmp_path / "a")
    assert pipeline.stages.recorded is None
    tensors = dump.read_dump(tmp_path / "a")
    assert {name.rpartition(".")[0] for name in tensors} == {"", *STAGES}
    assert tensors["points"].dtype == np.float16
    np.testing.assert_array_equal(tensors["points"], frame["points"][0].half().numpy())
    np.testing.assert_array_equal(tensors["camera.backbone.img"], frame["img"].numpy())
    np.testing.assert_array_equal(tensors["camera2lidar"], frame["camera2lidar"].numpy())
    np.testing.assert_array_equal(tensors["fuser.lidar"], tensors["lidar.backbone.lidar"])
    again = FileStages(folder(WEAK_FLOAT)).run(TRANSFORM, feat_in=tensors["camera.vtransform.feat_in"])
    np.testing.assert_array_equal(again["feat_out"], tensors["camera.vtransform.feat_out"])

    shuffled = np.random.default_rng(0).permutation
    other = dict(tensors)
    for names, axis in ((dump.VOXELS, 0), (dump.PROPOSALS, 2), (dump.BOXES, 0)):
        order = shuffled(tensors[names[0]].shape[axis])
        other |= {name: tensors[name].take(order, axis) for name in names}
    other["head.bbox.dim"] = other["head.bbox.dim"] * 1.5
    del other["points"]
    dump.write_dump(tmp_path / "b", other)
    differences = {d.name: d for d in dump.compare(tensors, dump.read_dump(tmp_path / "b"))}
    assert {name for name, d in differences.items() if d.relative != 0} == {"head.bbox.dim", "points"}
    assert differences["head.bbox.dim"].relative == pytest.approx(0.5)
    assert differences["points"].shapes[1] is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dump", str(tmp_path / "a"), str(tmp_path / "b")])
        assert dump.main() == 0
        assert "absent" in capsys.readouterr().out
        patch.setattr("sys.argv", ["dump", str(tmp_path / "a"), str(tmp_path / "none")])
        assert dump.main() == 2
    assert "none: no .tensor files" in capsys.readouterr().err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def rename_operator(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "fuser.onnx").unlink(), "lacks fuser.onnx"),
        (lambda path: (path / "lidar.backbone.xyz.onnx").unlink(), "lacks lidar.backbone.xyz.onnx"),
        (lambda path: truncate(path / "head.bbox.onnx"), "head.bbox.onnx is no ONNX file"),
        (lambda path: rename_operator(path / "camera.vtransform.onnx"), "can't be executed.*Unheard"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_damaged_folders(folder, tmp_path, damage, words):
    path = shutil.copytree(folder(WEAK_FLOAT), tmp_path / "files")
    damage(path)
    with pytest.raises(QuantizationError, match=words):
        FileStages(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["image_size=[64,192]"], "img is 1 x 6 x 3 x 64 x 176, the config's 1 x N x 3 x 64 x 192"),
        (["model.encoders.camera.vtransform.xbound=[-14.4,14.4,0.4]"], "feat_in"),
        (["model.encoders.camera.vtransform.dbound=[1.0,50.0,0.5]"], "camera_depth_weights"),
        (["model.heads.object.num_proposals=30"], "score is 1 x 10 x 20, the config's 1 x 10 x 30"),
        (["model.encoders.lidar.backbone.sparse_shape=[400,384,41]"], "grid is 384 x 384 x 41"),
        (["model.encoders.camera=null", "model.fuser=null"], "one sensor"),
    ],
)
def test_files_of_another_config(folder, change, words):
    with pytest.raises(InputError, match=words):
        open_files(load_config(ROOT / arguments.DEFAULT_CONFIG, [*REDUCED, *change]), folder(WEAK_FLOAT))


def test_a_frame_that_does_not_fit(cfg, frame, folder):
    files = open_files(cfg, folder(WEAK_FLOAT), integer=False)
    matrices = ("camera_intrinsics", "camera2lidar", "lidar2image", "img_aug_matrix")
    five = {**frame, "img": frame["img"][:, :5], **{name: frame[name][:, :5] for name in matrices}}
    with pytest.raises(QuantizationError, match=r"camera.backbone.onnx: img is \[1, 6, 3, 64, 176\], not \[1, 5"):
        files(**five)
    with pytest.raises(QuantizationError, match="a voxel has 5 features in the file, not 4"):
        files(**{**frame, "points": [frame["points"][0][:, :4]]})
    bright = {**frame, "img": frame["img"] * float("inf")}
    with pytest.raises(QuantizationError, match=r"camera.backbone: img holds NaN"):
        files(**bright)


@pytest.fixture(scope="module")
def world(model, tmp_path_factory):
    """A tiny data set, and the quantised model as a file."""
    root = tiny.TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(root, "v1.0-mini", database=False)
    torch.save(MMDataParallel(copy.deepcopy(model), device_ids=[]), root / "ptq.pth")
    return root


def evaluate(world, *arguments: object):
    common_options = ("--dataset-root", world, "--device", "cpu", "--workers", "0", "--cfg-options", *REDUCED)
    return run_script("eval.py", *arguments, *common_options)


def test_evaluating_files_beside_the_model(world, folder, tmp_path):
    arguments = ("--onnx", folder(WEAK), "--compare", world / "ptq.pth", "--limit", "1", "--dump", tmp_path / "dump")
    done = evaluate(world, *arguments, "--out", tmp_path / "out.json")
    assert done.status == 0, done.err
    assert folder(WEAK).name in done.out
    assert "1 of the 3 frames" in done.out
    assert (tmp_path / "out.json").is_file()
    assert (tmp_path / "out-compare.json").is_file()
    first, second = (dump.read_dump(tmp_path / name) for name in ("dump", "dump-compare"))
    assert first.keys() == second.keys()
    assert distance(first["lidar.backbone.lidar"], second["lidar.backbone.lidar"]) < 5e-4


def test_bad_input_of_eval(world, folder, tmp_path):
    expect_refusal(evaluate(world, "--onnx", tmp_path / "none"), "--onnx", "none: no such folder")
    expect_refusal(evaluate(world, "--onnx", tmp_path), "lacks camera.backbone.onnx")
    (tmp_path / "file").write_text("")
    done = evaluate(world, "--onnx", folder(WEAK_FLOAT), "--limit", "1", "--dump", tmp_path / "file")
    expect_refusal(done, "can't write there")
