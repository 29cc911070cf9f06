"""ObjectPaste and its ground-truth database."""

import pickle
import random

import numpy as np
import pytest
import torch
from mmdet3d.core.bbox import LiDARInstance3DBoxes
from mmdet3d.core.points import LiDARPoints
from shapely.geometry import Polygon

from bevfusion.boxes import lidar_to_legacy
from bevfusion.create_data import create_data
from bevfusion.data import build_dataset
from bevfusion.data.pipelines import ObjectPaste
from bevfusion.data.pipelines.paste import DataBaseSampler, MissingDatabaseError, bev_corners, overlaps
from bevfusion.errors import InputError
from tests.bevfusion.data_samples import dataset_config, reference_config, small_steps
from tests.bevfusion.tiny_nuscenes import TinyNuScenes

CLASSES = ("car", "pedestrian", "bicycle")
LOADER = {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 5, "use_dim": 5}


def write_database(root, objects, legacy_columns=9):
    """`objects`: class -> (mmdet3d box with gravity centre, number of points, difficulty); points fill the box."""
    rng = np.random.default_rng(0)
    entries = {}
    for name, rows in objects.items():
        entries[name] = []
        for number, (box, count, difficulty) in enumerate(rows):
            box = np.array(box, dtype=np.float64)
            local = rng.uniform(-0.45, 0.45, (count, 3)) * box[3:6]
            cos, sin = np.cos(box[6]), np.sin(box[6])
            points = np.zeros((count, 5), dtype=np.float32)
            points[:, :3] = local @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
            points[:, 3] = 100 + number
            points.tofile(root / f"{name}{number}.bin")
            entries[name].append(
                {
                    "name": name,
                    "path": f"{name}{number}.bin",
                    "box3d_lidar": lidar_to_legacy(box[None]).astype(np.float32)[0, :legacy_columns],
                    "num_points_in_gt": count,
                    "difficulty": difficulty,
                }
            )
    path = root / "dbinfos.pkl"
    path.write_bytes(pickle.dumps(entries))
    return {
        "info_path": str(path),
        "dataset_root": str(root),
        "rate": 1.0,
        "prepare": {"filter_by_difficulty": [-1], "filter_by_min_points": {"car": 5, "pedestrian": 5}},
        "sample_groups": {"car": 3, "pedestrian": 2},
        "classes": CLASSES,
        "points_loader": LOADER,
    }


def spaced(count, length=4.0, width=2.0, x=0.0, yaw=0.3):
    return [([x, 8.0 * i, 1.0, length, width, 1.6, yaw, 0.5, 0.1], 10 + i, 0) for i in range(count)]


@pytest.fixture
def config(tmp_path):
    return write_database(tmp_path, {"car": spaced(6), "pedestrian": spaced(4, 0.8, 0.6, x=20), "bicycle": spaced(2)})


def frame(boxes=(), labels=(), points=()):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 9)
    return {
        "gt_bboxes_3d": LiDARInstance3DBoxes(boxes, box_dim=9),
        "gt_labels_3d": np.array(labels, dtype=np.int64),
        "points": LiDARPoints(np.array(points, dtype=np.float32).reshape(-1, 5), points_dim=5),
    }


def inside(points, boxes):
    """(P, K) which points lie in which boxes."""
    offset = points[:, None, :3] - boxes.gravity_center[None]
    cos, sin = boxes.yaw.cos(), boxes.yaw.sin()
    along = (offset[..., 0] * cos + offset[..., 1] * sin).abs() <= boxes.dims[:, 0] / 2
    across = (offset[..., 1] * cos - offset[..., 0] * sin).abs() <= boxes.dims[:, 1] / 2
    return along & across & (offset[..., 2].abs() <= boxes.dims[:, 2] / 2)


def test_rectangles_overlap_as_shapely_says():
    rng = np.random.default_rng(3)
    boxes = np.zeros((40, 7))
    boxes[:, :2], boxes[:, 3:5] = rng.uniform(-6, 6, (40, 2)), rng.uniform(0.3, 4, (40, 2))
    boxes[:, 6] = rng.uniform(-4, 4, 40)
    boxes[20:25, 6] = 0
    boxes[0], boxes[1] = [0, 0, 0, 8, 8, 1, 0.4], [0, 0, 0, 1, 1, 1, 0]  # one inside the other
    boxes = torch.from_numpy(boxes)
    corners = bev_corners(boxes)
    shapes = [Polygon(rectangle) for rectangle in corners]
    expected = [[a.intersection(b).area > 1e-9 for b in shapes] for a in shapes]
    np.testing.assert_array_equal(overlaps(corners), expected)
    np.testing.assert_allclose([shape.area for shape in shapes], boxes[:, 3] * boxes[:, 4])
    mmdet3d = LiDARInstance3DBoxes(boxes.float()).corners[:, [0, 3, 7, 4], :2].numpy()
    np.testing.assert_allclose(np.sort(corners, axis=1), np.sort(mmdet3d, axis=1), atol=1e-4)


def test_classes_are_filled_up_and_points_lie_in_their_boxes(config):
    random.seed(1)
    data = ObjectPaste(config)(frame([[50, 50, 0, 4, 2, 1.6, 0, 0, 0]], [0], [[30, 30, 0, 1, 0]]))
    assert sorted(data["gt_labels_3d"]) == [0, 0, 0, 1, 1]
    boxes, points = data["gt_bboxes_3d"], data["points"].tensor
    assert len(boxes) == 5
    assert not np.triu(overlaps(bev_corners(boxes.tensor)), 1).any()
    torch.testing.assert_close(points[-1], torch.tensor([30.0, 30, 0, 1, 0]))
    members = inside(points[:-1], boxes)
    assert members.any(dim=1).all()
    assert (members[:, 1:].sum(dim=0) >= 10).all()
    np.testing.assert_allclose(boxes.gravity_center[1:, 2], 1.0, atol=1e-6)
    np.testing.assert_allclose(boxes.tensor[1:, 6], 0.3, atol=1e-5)
    np.testing.assert_allclose(boxes.tensor[1:, 7:], [[0.5, 0.1]] * 4, atol=1e-6)


def test_points_that_a_pasted_box_covers_are_removed(tmp_path):
    config = write_database(tmp_path, {"car": spaced(1)})
    scene = [[0, 0, 1.7, 1, 0], [0, 0, 0.3, 1, 0], [0, 0, 2.0, 2, 0], [0, 0, 0.1, 2, 0], [3, 0, 1, 2, 0]]
    data = ObjectPaste({**config, "sample_groups": {"car": 1}})(frame(points=scene))
    kept = data["points"].tensor[10:]
    assert kept[:, 3].tolist() == [2, 2, 2]  # above, below, beside: the box reaches from 0.2 m to 1.8 m


def test_objects_keep_clear_of_the_frame(config):
    blocked = [[0, 8.0 * i, 0.2, 4, 2, 1.6, 0.0, 0, 0] for i in range(6)]  # where all cars of the database are
    for seed in range(5):
        random.seed(seed)
        data = ObjectPaste(config)(frame(blocked, [2] * 6))
        assert sorted(data["gt_labels_3d"]) == [1, 1, *[2] * 6]


def test_objects_keep_clear_of_each_other(tmp_path):
    config = write_database(tmp_path, {"car": [*spaced(2), *spaced(2)]})  # two pairs in the same places
    for seed in range(5):
        random.seed(seed)
        data = ObjectPaste({**config, "sample_groups": {"car": 4}})(frame())
        assert len(data["gt_labels_3d"]) == 2


def test_filters_leave_out_objects(tmp_path):
    few, hard = ([9, 0, 1, 4, 2, 1.6, 0, 0, 0], 4, 0), ([9, 9, 1, 4, 2, 1.6, 0, 0, 0], 50, -1)
    config = write_database(tmp_path, {"car": [few, hard, *spaced(1)]})
    sampler = DataBaseSampler(**config)
    assert sampler.objects["car"].paths == ["car2.bin"]
    with pytest.raises(InputError, match="unknown filter filter_by_colour in 'prepare'"):
        DataBaseSampler(**{**config, "prepare": {"filter_by_colour": ["red"]}})


def test_boxes_without_velocity_and_empty_classes_serve(tmp_path):
    config = write_database(tmp_path, {"car": spaced(2)}, legacy_columns=7)
    data = ObjectPaste(config)(frame())
    assert data["gt_labels_3d"].tolist() == [0, 0]
    assert not data["gt_bboxes_3d"].tensor[:, 7:].any()


def test_draws_depend_on_the_random_state_only(config):
    paste = ObjectPaste(config)

    def drawn(seed):
        random.seed(seed)
        return paste(frame())["gt_bboxes_3d"].tensor

    first = drawn(4)
    others = [drawn(seed) for seed in range(10, 16)]
    torch.testing.assert_close(drawn(4), first, rtol=0, atol=0)
    assert any(other.shape != first.shape or not torch.equal(other, first) for other in others)


def test_rate_and_full_frames(config):
    cars = [[100 + 10 * i, 0, 0, 4, 2, 1, 0, 0, 0] for i in range(3)]
    data = ObjectPaste({**config, "sample_groups": {"car": 3}})(frame(cars, [0, 0, 0]))
    assert len(data["gt_labels_3d"]) == 3
    data = ObjectPaste({**config, "rate": 0.5, "sample_groups": {"car": 4}})(frame())
    assert len(data["gt_labels_3d"]) == 2


def test_pasting_stops_at_an_epoch(config):
    paste = ObjectPaste(config, stop_epoch=2)
    paste.set_epoch(1)
    assert len(paste(frame())["gt_labels_3d"])
    paste.set_epoch(2)
    assert not len(paste(frame())["gt_labels_3d"])
    assert ObjectPaste(config, stop_epoch=-1).sampler is None


@pytest.mark.parametrize("stop_epoch", [None, -1])
def test_missing_database_is_named(config, tmp_path, stop_epoch):
    missing = str(tmp_path / "nuscenes_dbinfos_train.pkl")
    with pytest.raises(MissingDatabaseError, match=r"nuscenes_dbinfos_train.pkl.*bevfusion.create_data --root"):
        ObjectPaste({**config, "info_path": missing}, stop_epoch)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"difficulty": 0, "num_points_in_gt": 9, "box3d_lidar": np.zeros(9)}, "key 'path' is missing"),
        ({"difficulty": 0, "path": "x", "box3d_lidar": np.zeros(9)}, "key 'num_points_in_gt' is missing"),
        ({"difficulty": 0, "num_points_in_gt": 9, "path": "x", "box3d_lidar": np.zeros(8)}, "should have 7 or 9"),
    ],
)
def test_broken_database_is_named(config, entry, complaint):
    with open(config["info_path"], "wb") as file:
        pickle.dump({"car": [entry]}, file)
    with pytest.raises(InputError, match=rf"dbinfos.pkl: car\[0\].*{complaint}"):
        DataBaseSampler(**config)


def test_objects_of_a_converted_data_set_are_pasted(tmp_path, golden):
    root = TinyNuScenes(tmp_path).save()
    create_data(root, "v1.0-mini", 10, 1)
    reference = reference_config(golden)["data"]["train"]["dataset"]["pipeline"]
    sampler = next(step for step in reference if step["type"] == "ObjectPaste")["db_sampler"]
    sampler = {**sampler, "dataset_root": str(root), "info_path": str(root / "nuscenes_dbinfos_train.pkl")}
    steps = small_steps(
        ObjectPaste={"db_sampler": sampler, "stop_epoch": None}, GlobalRotScaleTrans={"is_train": False}
    )
    cfg = dataset_config(reference_config(golden), "train", root, root / "nuscenes_infos_train.pkl", **steps)
    dataset = build_dataset(cfg)
    random.seed(0)
    data = dataset.prepare(0)
    labels, boxes = data["gt_labels_3d"].data, data["gt_bboxes_3d"].data
    assert (labels == 8).sum() == 2  # one pedestrian of the frame, another pasted
    counts = inside(data["points"].data, boxes).sum(dim=0)
    assert (counts[labels == 8] >= 12).all()
