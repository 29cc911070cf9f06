"""The info files and the ground-truth database, on a data set whose geometry is known."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion
from scipy.spatial.transform import Rotation

from bevfusion.create_data import create_data
from bevfusion.create_data.__main__ import main
from bevfusion.create_data.database import points_in_boxes
from bevfusion.errors import InputError
from tests.bevfusion import tiny_nuscenes as tiny

DATABASE = "nuscenes_gt_database"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return tiny.TinyNuScenes(tmp_path_factory.mktemp("pristine")).save()


@pytest.fixture(scope="module")
def converted(pristine, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("converted") / "nuscenes"
    shutil.copytree(pristine, root)
    create_data(root, "v1.0-mini")
    return root


@pytest.fixture
def root(pristine, tmp_path) -> Path:
    shutil.copytree(pristine, tmp_path / "nuscenes")
    return tmp_path / "nuscenes"


def load(path: Path):
    with path.open("rb") as file:
        return pickle.load(file)


def digests(root: Path) -> dict[str, str]:
    files = [*root.glob("nuscenes_*.pkl"), *(root / DATABASE).glob("*")]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_each_split_gets_its_scenes(converted):
    for split, scene in zip(("train", "val"), tiny.SCENES, strict=True):
        content = load(converted / f"nuscenes_infos_{split}.pkl")
        assert content["metadata"] == {"version": "v1.0-mini"}
        assert [info["token"] for info in content["infos"]] == [tiny.token("sample", scene, k) for k in range(3)]
        assert {info["scene_token"] for info in content["infos"]} == {tiny.token("scene", scene)}


def test_layout_is_the_original_one(converted, golden):
    reference = json.loads((golden / "realframe_info.json").read_text())["infos"][0]
    info = load(converted / "nuscenes_infos_train.pkl")["infos"][2]
    assert set(info) - {"scene_token"} == set(reference)
    assert list(info["cams"]) == list(reference["cams"])
    for channel, camera in reference["cams"].items():
        assert set(camera) <= set(info["cams"][channel])
        assert info["cams"][channel]["type"] == channel
    sensor = {
        "data_path",
        "type",
        "sample_data_token",
        "timestamp",
        "sensor2lidar_rotation",
        "sensor2lidar_translation",
    }
    poses = {f"{frame}_{part}" for frame in ("sensor2ego", "ego2global") for part in ("rotation", "translation")}
    assert all(set(sweep) == sensor | poses for sweep in info["sweeps"])
    assert info["gt_boxes"].shape == (5, 7)


def test_boxes_and_velocities_are_in_the_lidar_frame(converted):
    for frame, info in enumerate(load(converted / "nuscenes_infos_train.pkl")["infos"]):
        seconds = frame * 0.5
        centres = np.array([tiny.object_centre(number, seconds) for number in range(len(tiny.OBJECTS))])
        expected = tiny.global_to_lidar(centres, seconds)
        np.testing.assert_allclose(info["gt_boxes"][:, :3], expected, atol=1e-9)
        np.testing.assert_allclose(info["gt_boxes"][:, 3:6], [spec[2] for spec in tiny.OBJECTS])
        ahead = [Rotation.from_euler("z", spec[5]).apply([1.0, 0.0, 0.0]) for spec in tiny.OBJECTS]
        nose = tiny.global_to_lidar(centres + ahead, seconds) - expected
        yaw = -info["gt_boxes"][:, 6] - np.pi / 2
        # a yaw alone can't express the small tilt between the frames
        np.testing.assert_allclose(np.cos(yaw - np.arctan2(nose[:, 1], nose[:, 0])), 1, atol=1e-3)
        moved = np.array([[*spec[4], 0.0] for spec in tiny.OBJECTS])
        expected_velocity = (tiny.global_to_lidar(centres + moved, seconds) - expected)[:, :2]
        np.testing.assert_allclose(info["gt_velocity"], expected_velocity, atol=1e-6)
        assert info["gt_names"].tolist() == ["car", "pedestrian", "traffic_cone", "truck", "animal"]
        assert info["num_lidar_pts"].tolist() == [40, 12, 6, 0, 5]
        assert info["valid_flag"].tolist() == [True, True, True, False, True]


def test_real_frame_survives_the_way_through_the_tables(golden, tmp_path):
    """Boxes of the real keyframe, lifted to the global frame as an annotation table would hold them, come back."""
    reference = json.loads((golden / "realframe_info.json").read_text())["infos"][0]
    boxes = np.array(reference["gt_boxes"])
    tables = tiny.TinyNuScenes(tmp_path)
    lidar2ego, ego2global = Quaternion(reference["lidar2ego_rotation"]), Quaternion(reference["ego2global_rotation"])
    for record in tables.tables["calibrated_sensor"]:
        if record["token"] == tiny.token("calibrated_sensor", "LIDAR_TOP"):
            record.update(translation=reference["lidar2ego_translation"], rotation=list(lidar2ego))
    for record in tables.tables["ego_pose"]:
        record.update(translation=reference["ego2global_translation"], rotation=list(ego2global))
    template = next(
        r for r in tables.tables["sample_annotation"] if r["sample_token"] == tiny.token("sample", "scene-0061", 0)
    )
    tables.tables["sample_annotation"] = []
    for number, row in enumerate(boxes):
        box = Box(row[:3], row[3:6], Quaternion(axis=[0, 0, 1], radians=-row[6] - np.pi / 2))
        for rotation, frame in ((lidar2ego, "lidar2ego"), (ego2global, "ego2global")):
            box.rotate(rotation)
            box.translate(np.array(reference[f"{frame}_translation"]))
        record = {"translation": list(box.center), "size": list(box.wlh), "rotation": list(box.orientation)}
        tables.tables["sample_annotation"].append(
            {**template, "token": f"box{number}", **record, "prev": "", "next": ""}
        )
    tables.save()
    create_data(tmp_path, "v1.0-mini", database=False)
    info = load(tmp_path / "nuscenes_infos_train.pkl")["infos"][0]
    difference = info["gt_boxes"] - boxes
    difference[:, 6] = (difference[:, 6] + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_allclose(difference, 0, atol=1e-6)
    assert np.isnan(info["gt_velocity"]).all()  # an object seen once has no velocity


def test_sweeps_walk_back_and_lead_into_the_keyframe(converted):
    infos = load(converted / "nuscenes_infos_train.pkl")["infos"]
    assert [len(info["sweeps"]) for info in infos] == [0, 3, 6]
    cone = tiny.object_centre(2, 0.0)  # stands still
    last = infos[2]
    stamps = [sweep["timestamp"] for sweep in last["sweeps"]]
    assert stamps == sorted(stamps, reverse=True)
    assert stamps[0] < last["timestamp"]
    for sweep in last["sweeps"]:
        seconds = (sweep["timestamp"] - last["timestamp"]) / 1e6 + 1.0
        seen = tiny.global_to_lidar(cone[None], seconds)
        moved = seen @ sweep["sensor2lidar_rotation"].T + sweep["sensor2lidar_translation"]
        np.testing.assert_allclose(moved, tiny.global_to_lidar(cone[None], 1.0), atol=1e-5)


def test_fewer_sweeps_on_request(root):
    create_data(root, "v1.0-mini", max_sweeps=2, database=False)
    assert [len(info["sweeps"]) for info in load(root / "nuscenes_infos_train.pkl")["infos"]] == [0, 2, 2]
    assert not (root / DATABASE).exists()


def test_database_holds_the_points_of_each_object(converted):
    entries = load(converted / "nuscenes_dbinfos_train.pkl")
    infos = {info["token"]: info for info in load(converted / "nuscenes_infos_train.pkl")["infos"]}
    assert {name: len(objects) for name, objects in entries.items() if objects} == {
        "car": 3,
        "pedestrian": 3,
        "traffic_cone": 3,
    }
    groups = [entry["group_id"] for objects in entries.values() for entry in objects]
    assert sorted(groups) == list(range(9))
    for entry in entries["traffic_cone"]:
        info = infos[entry["image_idx"]]
        points = np.fromfile(converted / entry["path"], "<f4").reshape(-1, 5)
        # the cone stands still: its six points of the keyframe, and of every sweep
        assert len(points) == entry["num_points_in_gt"] == 6 * (1 + len(info["sweeps"]))
        assert sorted(set(points[:, 4].round(3))) == sorted(
            {np.float32((info["timestamp"] - s["timestamp"]) / 1e6).round(3) for s in info["sweeps"]} | {np.float32(0)}
        )
        np.testing.assert_allclose(entry["box3d_lidar"][:7], info["gt_boxes"][entry["gt_idx"]], rtol=1e-6)
        assert entry["box3d_lidar"].shape == (9,)
        assert np.abs(points[:, :2]).max() < 0.4
        assert np.abs(points[:, 2]).max() < 0.51
    assert {path.name for path in (converted / DATABASE).iterdir()} == {
        Path(entry["path"]).name for objects in entries.values() for entry in objects
    }


def test_points_in_boxes_agrees_with_the_devkit():
    rng = np.random.default_rng(0)
    points = rng.uniform(-10, 10, (5000, 3))
    boxes = np.column_stack([rng.uniform(-8, 8, (20, 3)), rng.uniform(0.5, 6, (20, 3)), rng.uniform(-4, 4, 20)])
    for box, members in zip(boxes, points_in_boxes(points, boxes), strict=True):
        reference = Box(box[:3], box[[4, 3, 5]], Quaternion(axis=[0, 0, 1], radians=box[6]))
        np.testing.assert_array_equal(members, np.flatnonzero(points_in_box(reference, points.T)))


def test_running_again_gives_the_same_bytes(converted, root):
    create_data(root, "v1.0-mini", workers=3)
    first = digests(root)
    assert len(first) == 12
    assert first == digests(converted)
    create_data(root, "v1.0-mini")
    assert digests(root) == first


def test_stopped_half_way_and_run_again_gives_the_same_bytes(converted, root):
    cloud = root / "samples/LIDAR_TOP/scene-0061_6.pcd.bin"
    content = cloud.read_bytes()
    cloud.write_bytes(b"123")
    with pytest.raises(InputError, match="scene-0061_6"):
        create_data(root, "v1.0-mini")
    assert not (root / DATABASE).exists()
    # what a kill signal leaves behind
    (root / f"{DATABASE}.partial/half.bin").write_bytes(b"1")
    (root / "nuscenes_infos_val.pkl.partial").write_bytes(b"1")
    cloud.write_bytes(content)
    create_data(root, "v1.0-mini")
    assert digests(root) == digests(converted)
    assert not list(root.glob("*.partial"))


def test_scenes_that_are_not_downloaded_are_left_out(root, caplog):
    shutil.rmtree(root / "samples/LIDAR_TOP")
    with pytest.raises(InputError, match=r"no scene of v1\.0-mini"):
        create_data(root, "v1.0-mini")
    assert "2 of 2 scenes" in caplog.text


def test_test_split_has_no_annotations(tmp_path):
    tiny.TinyNuScenes(tmp_path, "v1.0-test", ("scene-0077",)).save()
    assert create_data(tmp_path, "v1.0-test") == {"nuscenes_infos_test.pkl": 3}
    info = load(tmp_path / "nuscenes_infos_test.pkl")["infos"][0]
    assert "gt_boxes" not in info
    assert len(info["cams"]) == 6


def break_annotation(tables):
    tables["sample_annotation"][1]["instance_token"] = "nowhere"


def break_pose(tables):
    tables["sample_data"][3]["ego_pose_token"] = "nowhere"


def break_chain(tables):
    tables["sample_data"][-1]["prev"] = "nowhere"


def drop_field(tables):
    del tables["sample_data"][0]["calibrated_sensor_token"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (break_annotation, r"sample_annotation\.json: instance_token of record '\w+' names 'nowhere'"),
        (
            break_pose,
            r"sample_data\.json: ego_pose_token of record '\w+' names 'nowhere', which is not in ego_pose\.json",
        ),
        (break_chain, r"sample_data\.json: prev of record '\w+' names 'nowhere'"),
        (drop_field, r"sample_data\.json: record '\w+' has no field 'calibrated_sensor_token'"),
    ],
)
def test_broken_references_are_named(tmp_path, edit, message):
    writer = tiny.TinyNuScenes(tmp_path)
    edit(writer.tables)
    writer.save()
    with pytest.raises(InputError, match=message):
        create_data(tmp_path, "v1.0-mini")
    assert not list(tmp_path.glob("*.pkl"))


def spoil_table(root):
    (root / "v1.0-mini/scene.json").write_text("[{")


def remove_table(root):
    (root / "v1.0-mini/log.json").unlink()


def remove_map(root):
    (root / "maps/map.png").unlink()


def remove_image(root):
    (root / "samples/CAM_BACK/scene-0103_1.jpg").unlink()


def truncate_cloud(root):
    (root / "sweeps/LIDAR_TOP/scene-0061_1.pcd.bin").write_bytes(b"123")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda root: shutil.rmtree(root / "v1.0-mini"), "has no nuScenes version v1.0-mini (found: no v1.0-* folder)"),
        (spoil_table, "scene.json is not valid JSON"),
        (remove_table, "log.json is missing"),
        (remove_map, "map mask"),
        (remove_image, "CAM_BACK/scene-0103_1.jpg is named in sample_data.json but does not exist"),
        (truncate_cloud, "scene-0061_1.pcd.bin is empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(root, capsys, spoil, message):
    spoil(root)
    assert main(["--root", str(root)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_command_line(root):
    command = [sys.executable, "-m", "bevfusion.create_data", "--root", str(root), "--version", "v1.0-mini"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nuscenes_infos_train.pkl" in done.stdout
    assert (root / "nuscenes_dbinfos_train.pkl").is_file()
