"""The data set that the synthetic world writes: tables, files, determinism, resumption and bad input."""

import hashlib
import json
import multiprocessing
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from bevfusion.errors import InputError
from bevfusion.synthetic import generate
from bevfusion.synthetic.__main__ import main
from bevfusion.synthetic.options import split_names

TINY = {"scenes": 1, "val_scenes": 1, "frames": 3, "image_size": (320, 180), "seed": 5, "progress": False}


def digest(folder: Path) -> dict[str, str]:
    """Relative path and hash of every file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "world"
    generate(out, workers=2, **TINY)
    return out


@pytest.fixture(scope="module")
def nusc(world):
    from nuscenes import NuScenes

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return NuScenes("v1.0-mini", str(world), verbose=False)


def test_scene_names_are_those_of_the_splits(nusc):
    from nuscenes.utils.splits import mini_train, mini_val, train, val

    assert [scene["name"] for scene in nusc.scene] == [mini_train[0], mini_val[0]]
    assert split_names("v1.0-mini") == (mini_train, mini_val)
    assert split_names("v1.0-trainval") == (train, val)


def test_every_token_leads_somewhere(nusc):
    single = {
        "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
        "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
        "sample_data": {
            "sample_token": "sample",
            "ego_pose_token": "ego_pose",
            "calibrated_sensor_token": "calibrated_sensor",
            "prev": "sample_data",
            "next": "sample_data",
        },
        "calibrated_sensor": {"sensor_token": "sensor"},
        "instance": {
            "category_token": "category",
            "first_annotation_token": "sample_annotation",
            "last_annotation_token": "sample_annotation",
        },
        "sample_annotation": {
            "sample_token": "sample",
            "instance_token": "instance",
            "visibility_token": "visibility",
            "prev": "sample_annotation",
            "next": "sample_annotation",
        },
    }
    for table, fields in single.items():
        rows = getattr(nusc, table)
        assert rows
        assert len({row["token"] for row in rows}) == len(rows)
        for row in rows:
            for field, target in fields.items():
                if row[field] or field not in ("prev", "next"):
                    nusc.get(target, row[field])
    for row in nusc.sample_annotation:
        for token in row["attribute_tokens"]:
            nusc.get("attribute", token)


def test_files_are_there_and_nothing_else_is(nusc, world):
    files = {row["filename"] for row in nusc.sample_data} | {row["filename"] for row in nusc.map}
    on_disk = {str(p.relative_to(world)) for p in world.rglob("*") if p.is_file()}
    assert files <= on_disk
    tables = {f"v1.0-mini/{name}.json" for name in nusc.table_names}
    assert on_disk - files == tables | {"synthetic.json"}


def test_timestamps_are_those_of_the_sensors(nusc):
    for scene in nusc.scene:
        sample = nusc.get("sample", scene["first_sample_token"])
        data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        back = []
        while data["prev"]:
            data = nusc.get("sample_data", data["prev"])
        while data:
            back.append((data["timestamp"], data["is_key_frame"]))
            data = nusc.get("sample_data", data["next"]) if data["next"] else None
        steps = np.diff([t for t, _ in back])
        keys = np.diff([t for t, key in back if key])
        assert (keys == 500_000).all()
        assert set(steps) == {50_000, 400_000}
        assert sum(key for _, key in back) == scene["nbr_samples"] == TINY["frames"]
        for channel, token in sample["data"].items():
            lag = nusc.get("sample_data", token)["timestamp"] - sample["timestamp"]
            assert lag == 0 if channel == "LIDAR_TOP" else -50_000 < lag < 0


def test_images_and_clouds_can_be_read(nusc, world):
    for row in nusc.sample_data[:: len(nusc.sample_data) // 12]:
        path = world / row["filename"]
        if row["fileformat"] == "jpg":
            picture = cv2.imread(str(path))
            assert picture.shape == (180, 320, 3)
            assert picture.std() > 15
        else:
            cloud = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
            assert len(cloud) > 10_000
            assert np.isfinite(cloud).all()


def test_annotations_are_those_of_the_benchmark(nusc):
    from nuscenes.eval.detection.utils import category_to_detection_name, detection_name_to_rel_attributes

    seen = set()
    for row in nusc.sample_annotation:
        name = category_to_detection_name(row["category_name"])
        attributes = [nusc.get("attribute", token)["name"] for token in row["attribute_tokens"]]
        allowed = detection_name_to_rel_attributes(name)
        assert len(attributes) == bool(allowed)
        assert set(attributes) <= set(allowed)
        assert row["translation"][2] == pytest.approx(row["size"][2] / 2, abs=1e-3)
        seen.add(name)
    assert len(seen) == 10


def test_point_counts_are_what_the_devkit_finds_less_the_ground(nusc, world):
    from nuscenes.utils.geometry_utils import points_in_box

    for sample in nusc.sample[::2]:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)[:, :3].T.astype(np.float64)
        for box in boxes:
            counted = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            inside = points[:, points_in_box(box, points)]
            # Ground and clutter are 10 cm and more below the top of what they touch of a box.
            local = box.orientation.inverse.rotation_matrix @ (inside - box.center[:, None])
            above = int((local[2] > -box.wlh[2] / 2 + 0.1).sum())
            assert above <= counted <= inside.shape[1]


def test_velocities_are_those_of_the_motion(nusc):
    moving = 0
    for row in nusc.sample_annotation:
        velocity = nusc.box_velocity(row["token"])[:2]
        if np.isnan(velocity).any():
            assert not row["prev"] and not row["next"]
            continue
        attribute = nusc.get("attribute", row["attribute_tokens"][0])["name"] if row["attribute_tokens"] else ""
        box = nusc.get_box(row["token"])
        ahead = box.orientation.rotation_matrix[:2, 0]
        if attribute.endswith("moving"):
            moving += 1
            assert velocity @ ahead > 0.05
            assert abs(velocity @ [-ahead[1], ahead[0]]) < 0.15
        elif attribute in ("vehicle.parked", "pedestrian.standing", ""):
            assert np.abs(velocity).max() < 1e-6
    assert moving > 20


def test_visibility_reflects_what_is_seen(nusc):
    levels = {row["token"]: 0 for row in nusc.visibility}
    for row in nusc.sample_annotation:
        levels[row["visibility_token"]] += 1
    assert all(levels.values())


def test_the_devkit_renders_it(nusc, tmp_path):
    import matplotlib

    matplotlib.use("agg")
    sample = nusc.sample[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the devkit's own, about numpy
        for channel in ("LIDAR_TOP", "CAM_FRONT"):
            nusc.render_sample_data(sample["data"][channel], out_path=str(tmp_path / f"{channel}.png"), verbose=False)
    for name in ("LIDAR_TOP", "CAM_FRONT"):
        assert cv2.imread(str(tmp_path / f"{name}.png")).std() > 10


def test_the_map_is_drivable_where_the_ego_vehicle_drives(nusc):
    for scene, row in zip(nusc.scene, nusc.map, strict=True):
        sample = nusc.get("sample", scene["last_sample_token"])
        data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        x, y, _ = nusc.get("ego_pose", data["ego_pose_token"])["translation"]
        assert row["mask"].is_on_mask(x, y).all()
        assert 0.005 < (row["mask"].mask() > 0).mean() < 0.6


def test_bytes_do_not_depend_on_the_number_of_processes(world, tmp_path):
    generate(tmp_path / "one", workers=1, **TINY)
    assert digest(tmp_path / "one") == digest(world)


def test_another_seed_gives_another_world(world, tmp_path):
    generate(tmp_path / "w", workers=1, **(TINY | {"seed": 6, "frames": 1}))
    other, first = digest(tmp_path / "w"), digest(world)
    shared = set(other) & set(first)
    assert len([name for name in shared if name.endswith(".jpg")]) == 12
    assert all(other[name] != first[name] for name in shared if name.startswith("samples"))


def runs(pid: int) -> bool:
    """Whether a process is there and is not merely waiting to be reaped."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_an_interrupted_run_completes_to_the_same_bytes(world, tmp_path):
    """A run killed half-way leaves no process behind, and the next one completes what it began."""
    out = tmp_path / "w"
    process = multiprocessing.get_context("fork").Process(target=generate, args=(out,), kwargs=TINY | {"workers": 2})
    process.start()
    assert wait_until(lambda: len(list(out.glob(".records/*/*.json"))) >= 2)
    children = [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.join()
    assert len(children) == 2
    assert wait_until(lambda: not any(runs(pid) for pid in children))
    assert not (out / "v1.0-mini").exists()
    generate(out, workers=2, **TINY)
    assert digest(out) == digest(world)


def test_a_lost_file_is_made_again(world):
    before = digest(world)
    lost = next((world / "samples/CAM_BACK").iterdir())
    lost.unlink()
    generate(world, workers=1, **TINY)
    assert digest(world) == before


def test_more_sweeps_and_camera_images_on_request(tmp_path):
    from nuscenes import NuScenes

    options = {"scenes": 0, "val_scenes": 1, "frames": 2, "image_size": (160, 90), "progress": False}
    generate(tmp_path / "w", version="v1.0-trainval", sweeps=3, camera_sweeps=2, workers=1, **options)
    nusc = NuScenes("v1.0-trainval", str(tmp_path / "w"), verbose=False)
    counts = {}
    for row in nusc.sample_data:
        counts[row["channel"]] = counts.get(row["channel"], 0) + 1
        assert (tmp_path / "w" / row["filename"]).stat().st_size > 1000
    assert counts.pop("LIDAR_TOP") == 8
    assert set(counts.values()) == {6}
    assert nusc.scene[0]["name"] == "scene-0003"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"frames": 0}, "--frames is 0"),
        ({"frames": 41}, "from 1 to 40"),
        ({"scenes": 9}, "--scenes is 9: with v1.0-mini it must be from 0 to 8"),
        ({"val_scenes": -1}, "--val-scenes is -1"),
        ({"scenes": 0, "val_scenes": 0}, "at least one scene"),
        ({"version": "v1.0-test"}, "--version is 'v1.0-test'"),
        ({"image_size": (10, 450)}, "--image-size (width) is 10"),
        ({"workers": 0}, "--workers is 0"),
        ({"sweeps": 10}, "--sweeps is 10"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, change, complaint):
    with pytest.raises(InputError) as caught:
        generate(tmp_path / "w", **(TINY | change))
    assert complaint in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_a_folder_with_other_content_is_left_alone(world, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="not empty"):
        generate(tmp_path, **TINY)
    with pytest.raises(InputError, match="made with other options"):
        generate(world, **(TINY | {"seed": 6}))
    assert json.loads((world / "synthetic.json").read_text())["seed"] == 5


def test_a_folder_that_cannot_be_written_is_one_line_on_stderr(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "world"), "--scenes", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert "can't write the world at" in printed.err


def test_the_command_line_refuses_what_it_cannot_do(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "w"), "--frames", "0"]) == 2
    assert "--frames is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path / "w"), "--image-size", "wide"])
    assert caught.value.code == 2
