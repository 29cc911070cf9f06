"""Info files: two layouts, several converters, damaged and hostile files."""

import copy
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from bevfusion.boxes import legacy_to_lidar
from bevfusion.create_data import create_data
from bevfusion.data import load_infos, load_pickle
from bevfusion.data.nuscenes import NuScenesDataset
from bevfusion.data.paths import find_file
from bevfusion.errors import InputError
from tests.bevfusion.data_samples import CLASSES, many_infos, reference_info, write_infos
from tests.bevfusion.tiny_nuscenes import KEYFRAMES, SWEEPS_BETWEEN, TinyNuScenes, token


@pytest.fixture
def info(golden):
    return reference_info(golden)


def only_frame(path):
    frames, _ = load_infos(path)
    assert len(frames) == 1
    return frames[0]


def assert_same_frames(a, b, atol=1e-6):
    assert (a.token, a.timestamp, a.cameras.names) == (b.token, b.timestamp, b.cameras.names)
    for name in ("lidar2ego", "ego2global"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=atol)
    for name in ("intrinsics", "camera2ego", "camera2lidar"):
        np.testing.assert_allclose(getattr(a.cameras, name), getattr(b.cameras, name), atol=atol)
    np.testing.assert_allclose(a.sweeps.sweep2lidar, b.sweeps.sweep2lidar, atol=atol)
    np.testing.assert_allclose(a.sweeps.timestamps, b.sweeps.timestamps)
    boxes_a, boxes_b = a.ground_truth.boxes, b.ground_truth.boxes
    np.testing.assert_allclose(np.delete(boxes_a, 6, 1), np.delete(boxes_b, 6, 1), atol=atol)
    np.testing.assert_allclose(np.exp(1j * boxes_a[:, 6]), np.exp(1j * boxes_b[:, 6]), atol=atol)
    for name in ("lidar_points", "valid"):
        np.testing.assert_array_equal(getattr(a.ground_truth, name), getattr(b.ground_truth, name))
    # mmdet3d's layout keeps only the names of the ten classes
    names_a, names_b = ([n if n in CLASSES else "" for n in frame.ground_truth.names] for frame in (a, b))
    assert names_a == names_b


def test_both_layouts_of_the_real_frame_agree(golden, realframe):
    a = only_frame(next(realframe.glob("*.pkl")))
    b = only_frame(golden / "realframe_info.json")
    assert_same_frames(a, b)
    assert a.scene == b.scene == "n015-2018-07-24-11-22-45+0800#0"
    assert len(a.ground_truth.names) == 69
    assert (a.ground_truth.lidar_points > 0).sum() == 66


def test_intrinsics_go_by_two_names(tmp_path, info):
    expected = only_frame(write_infos(tmp_path / "a.json", [info]))
    for camera in info["cams"].values():
        camera["cam_intrinsic"] = camera.pop("camera_intrinsics")
    assert_same_frames(only_frame(write_infos(tmp_path / "b.json", [info])), expected, atol=0)


def test_boxes_with_length_first_are_told_apart(tmp_path, info):
    expected = only_frame(write_infos(tmp_path / "a.json", [info]))
    info["gt_boxes"] = legacy_to_lidar(np.array(info["gt_boxes"])).tolist()  # as mmdet3d 1.0rc writes them
    assert_same_frames(only_frame(write_infos(tmp_path / "b.json", [info])), expected)


def test_valid_flag_follows_from_the_point_counts(tmp_path, info):
    expected = only_frame(write_infos(tmp_path / "a.json", [info]))
    del info["valid_flag"]
    assert_same_frames(only_frame(write_infos(tmp_path / "b.json", [info])), expected, atol=0)


def test_frame_without_boxes_and_without_ground_truth(tmp_path, info):
    empty = {"gt_boxes": [], "gt_names": [], "gt_velocity": [], "num_lidar_pts": [], "valid_flag": []}
    path = write_infos(tmp_path / "empty.json", [{**info, **empty, "num_radar_pts": []}])
    assert NuScenesDataset(path, object_classes=CLASSES).get_ann_info(0)["gt_bboxes_3d"].tensor.shape == (0, 9)
    for key in (*empty, "num_radar_pts"):
        del info[key]
    dataset = NuScenesDataset(write_infos(tmp_path / "test.json", [info], "v1.0-test"), object_classes=CLASSES)
    assert dataset.data_infos[0].ground_truth is None
    assert dataset.version == "v1.0-test"
    assert dataset.get_ann_info(0)["gt_labels_3d"].shape == (0,)
    assert dataset.get_cat_ids(0) == []


def test_sweeps_of_mmdet3d_infos_are_inverted(tmp_path, realframe):
    content = pickle.loads(next(realframe.glob("*.pkl")).read_bytes())
    pose = np.eye(4)
    pose[:3, :3] = [[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]
    pose[:3, 3] = [1, 2, 3]
    cloud = {"lidar_path": "sweep.bin", "lidar2sensor": np.linalg.inv(pose).tolist()}
    content["data_list"][0]["lidar_sweeps"] = [{"timestamp": 1532402927.5, "lidar_points": cloud}]
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps(content))
    sweeps = only_frame(path).sweeps
    np.testing.assert_allclose(sweeps.sweep2lidar, [pose], atol=1e-12)
    assert sweeps.timestamps.tolist() == [1532402927500000.0]


def test_converted_nuscenes_loads(tmp_path):
    root = TinyNuScenes(tmp_path).save()
    create_data(root, "v1.0-mini", 10, 1, False)
    frames, metadata = load_infos(root / "nuscenes_infos_train.pkl")
    assert metadata["version"] == "v1.0-mini"
    assert len(frames) == KEYFRAMES
    assert {frame.scene for frame in frames} == {token("scene", "scene-0061")}
    assert [len(frame.sweeps.paths) for frame in frames] == [i * (SWEEPS_BETWEEN + 1) for i in range(KEYFRAMES)]


def test_frames_come_in_the_order_of_time(tmp_path, golden):
    infos = many_infos(golden, {"a": 3, "b": 2})
    path = write_infos(tmp_path / "infos.json", infos)
    assert [frame.token for frame in load_infos(path)[0]] == ["a-0", "a-1", "a-2", "b-0", "b-1"]
    assert [frame.token for frame in NuScenesDataset(path, load_interval=2).data_infos] == ["a-0", "a-2", "b-1"]


def test_scenes_are_derived_from_log_and_gaps(tmp_path, golden):
    infos = many_infos(golden, {"a": 3, "b": 2})
    for number, entry in enumerate(infos):
        del entry["scene_token"]
        entry["lidar_path"] = f"samples/LIDAR_TOP/n00{1 + (number == 0)}-log__LIDAR_TOP__{number}.pcd.bin"
    scenes = [frame.scene for frame in load_infos(write_infos(tmp_path / "infos.json", infos))[0]]
    assert scenes == ["n001-log#0"] * 3 + ["n001-log#1", "n002-log#0"]


MISSING = [
    ("token",), ("timestamp",), ("lidar_path",), ("sweeps",), ("cams",), ("lidar2ego_rotation",),
    ("ego2global_translation",), ("gt_names",), ("gt_velocity",), ("num_lidar_pts",), ("cams", "CAM_BACK", "data_path"),
    ("cams", "CAM_BACK", "camera_intrinsics"), ("cams", "CAM_BACK", "sensor2lidar_rotation"),
    ("cams", "CAM_BACK", "sensor2ego_translation"),
]  # fmt: skip


@pytest.mark.parametrize("keys", MISSING, ids="/".join)
def test_missing_key_is_named(tmp_path, info, keys):
    *outer, last = keys
    entry = info
    for key in outer:
        entry = entry[key]
    del entry[last]
    path = write_infos(tmp_path / "infos.json", [info])
    with pytest.raises(InputError) as caught:
        load_infos(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert f"key '{last}' is missing" in message
    assert all(part in message for part in outer)
    assert last == "token" or info["token"] in message


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("lidar2ego_rotation",), [1, 0, 0], "should have shape (4,), not (3,)"),
        (("lidar2ego_rotation",), [0, 0, 0, 0], "is the zero quaternion"),
        (("ego2global_translation",), [float("nan"), 0, 0], "holds NaN or infinity"),
        (("cams", "CAM_BACK", "sensor2lidar_rotation"), "north", "should be numbers of shape (3, 3)"),
        (("gt_names",), ["car"], "'gt_names' should have shape (69,), not (1,)"),
        (("valid_flag",), [True], "'valid_flag' should have shape (69,), not (1,)"),
        (("lidar_path",), 5, "'lidar_path' should be a string"),
        (("sweeps",), {}, "'sweeps' should be a list"),
        (("cams",), [], "'cams' should be a mapping"),
    ],
)
def test_wrong_value_is_named(tmp_path, info, keys, value, complaint):
    *outer, last = keys
    entry = info
    for key in outer:
        entry = entry[key]
    entry[last] = value
    with pytest.raises(InputError) as caught:
        load_infos(write_infos(tmp_path / "infos.json", [info]))
    assert info["token"] in str(caught.value)
    assert complaint in str(caught.value)


def test_frames_need_the_same_cameras(tmp_path, info):
    other = copy.deepcopy({**info, "token": "other"})
    del other["cams"]["CAM_BACK"]
    with pytest.raises(InputError, match="frame other has the cameras"):
        load_infos(write_infos(tmp_path / "infos.json", [info, other]))


def test_what_is_no_info_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nuscenes_infos_train.pkl does not exist.*bevfusion.create_data"):
        load_infos(tmp_path / "nuscenes_infos_train.pkl")
    path = tmp_path / "infos.json"
    for content, complaint in (
        ("[]", "key 'infos' (or 'data_list') is missing"),
        ('{"infos": []}', "lists no frames"),
        ('{"infos": [', "is not valid JSON"),
        ('{"infos": [3]}', "should be a mapping"),
        ('{"data_list": []}', "key 'metainfo' is missing"),
    ):
        path.write_text(content)
        with pytest.raises(InputError) as caught:
            load_infos(path)
        assert str(path) in str(caught.value)
        assert complaint in str(caught.value)


VALUES = {
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "names": np.array(["car", "truck"]),
    "objects": np.array([None, "x"], dtype=object),
    "scalar": np.float64(2.5),
    "flag": np.bool_(True),
    "bytes": b"\x00\xff",
    "set": {1, 2},
    "complex": 1j,
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_load(tmp_path, protocol):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(VALUES, protocol))
    loaded = load_pickle(path)
    assert loaded.keys() == VALUES.keys()
    for key, value in VALUES.items():
        assert type(loaded[key]) is type(value)
        np.testing.assert_array_equal(loaded[key], value)


def test_pickles_of_numpy_1_and_2_load(tmp_path):
    path = tmp_path / "array.pkl"
    stored = pickle.dumps(VALUES["array"], 2)
    for core in (b"numpy.core.", b"numpy._core."):
        content = stored.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core)
        assert core in content
        path.write_bytes(content)
        np.testing.assert_array_equal(load_pickle(path), VALUES["array"])


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Hostile(os.system, "touch run"), "system"),
        (Hostile(eval, "open('run', 'w')"), "builtins.eval"),
        (Hostile(np.save, "run", 1), "numpy.save"),
        (Hostile(getattr, dict, "fromkeys"), "builtins.getattr"),
        (np.load, "numpy.load"),
        (shutil.rmtree, "shutil.rmtree"),
    ],
)
def test_pickle_that_names_anything_else_is_refused(tmp_path, monkeypatch, content, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps({"infos": [content]}))
    with pytest.raises(InputError) as caught:
        load_infos(path)
    assert str(path) in str(caught.value)
    assert name in str(caught.value)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["infos.pkl"]


def test_damaged_pickle_is_refused(tmp_path):
    path = tmp_path / "infos.pkl"
    whole = pickle.dumps({"infos": [{"token": "t"}]})
    stored_elsewhere = b"\x80\x02U\x01aQ."
    for content in (b"", whole[:-5], b"\xff\xd8 not a pickle", json.dumps({"infos": []}).encode(), stored_elsewhere):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a complete pickle file") as refused:
            load_infos(path)
        assert "\n" not in str(refused.value)


def test_files_are_found_wherever_the_converter_put_them(tmp_path, monkeypatch):
    root = tmp_path / "work" / "data" / "nuscenes"
    file = root / "samples" / "CAM_FRONT" / "a.jpg"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.chdir(tmp_path / "work")
    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.touch()
    for stored in (
        str(file),
        "samples/CAM_FRONT/a.jpg",
        "data/nuscenes/samples/CAM_FRONT/a.jpg",
        "./data/nuscenes/samples/CAM_FRONT/a.jpg",
        "/other/machine/samples/nuscenes/samples/CAM_FRONT/a.jpg",
        "a.jpg",
    ):
        assert os.path.samefile(find_file(stored, "data/nuscenes", "CAM_FRONT"), file), stored
        assert os.path.samefile(find_file(stored, root, "CAM_FRONT"), file), stored
    assert find_file(str(elsewhere), root, "CAM_FRONT") == str(elsewhere)
    (root / "bare.jpg").touch()
    assert os.path.samefile(find_file("bare.jpg", root, "CAM_BACK"), root / "bare.jpg")
    with pytest.raises(InputError, match=r"CAM_BACK file a.jpg does not exist \(data root: data/nuscenes\)"):
        find_file("a.jpg", "data/nuscenes", "CAM_BACK")
