"""The transforms one by one, against geometry worked out another way."""

import logging

import numpy as np
import pytest
import torch
from mmdet3d.core.bbox import LiDARInstance3DBoxes
from mmdet3d.core.points import LiDARPoints
from PIL import Image

from bevfusion.create_data import create_data
from bevfusion.data import NuScenesDataset, build_dataset
from bevfusion.data.pipelines import (
    Collect3D,
    Compose,
    DefaultFormatBundle3D,
    GlobalRotScaleTrans,
    GridMask,
    ImageAug3D,
    ImageNormalize,
    LoadBEVSegmentation,
    LoadMultiViewImageFromFiles,
    LoadPointsFromFile,
    LoadPointsFromMultiSweeps,
    ObjectRangeFilter,
    RandomFlip3D,
)
from bevfusion.data.pipelines.images import _resize_crop
from bevfusion.data.pipelines.points import reduce_beams
from bevfusion.errors import InputError
from tests.bevfusion.data_samples import CLASSES, dataset_config, reference_config, small_steps
from tests.bevfusion.tiny_nuscenes import OBJECTS, TinyNuScenes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(root, "v1.0-mini", 10, 1, False)
    return root


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(7)
    torch.manual_seed(7)


def transformed(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def sorted_rows(corners):
    return np.array([sorted(map(tuple, box)) for box in np.round(corners, 3)])


# --- images


def test_test_images_are_resized_about_the_middle_and_cropped_at_the_bottom():
    image = Image.fromarray(np.random.randint(0, 256, (900, 1600, 3), dtype=np.uint8))
    aug = ImageAug3D([256, 704], [0.48, 0.48], [0.0, 0.0], [0.0, 0.0], False, False)
    data = aug({"img": [image]})
    expected = image.resize((768, 432), Image.Resampling.BICUBIC).crop((32, 176, 736, 432))
    np.testing.assert_array_equal(data["img"][0], expected)
    np.testing.assert_allclose(data["img_aug_matrix"][0] @ [100, 500, 1, 1], [100 * 0.48 - 32, 500 * 0.48 - 176, 1, 1])


@pytest.mark.parametrize("size", [(1600, 900), (800, 450), (640, 361)])
def test_partial_resize_equals_the_whole_one(size):
    image = Image.fromarray(np.random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for _ in range(10):
        scale = np.random.choice([0.48, 0.5, 0.44, np.random.uniform(0.3, 1.2)])
        new = (int(size[0] * scale), int(size[1] * scale))
        left, top = (int(np.random.randint(-20, length - 10)) for length in new)
        box = (left, top, left + int(np.random.randint(5, new[0])), top + int(np.random.randint(5, new[1])))
        expected = image.resize(new, Image.Resampling.BICUBIC).crop(box)
        np.testing.assert_array_equal(_resize_crop(image, new, box), expected)


def test_image_augmentation_matrix_follows_the_pixels():
    aug = ImageAug3D([200, 300], [0.8, 1.1], [0.0, 0.1], [-20, 20], True, True)
    mirrored = set()
    for _ in range(12):
        pixels = np.zeros((300, 400, 3), dtype=np.uint8)
        pixels[156:165, 196:205] = 255  # centred on the pixel corner (200.5, 160.5)
        data = aug({"img": [Image.fromarray(pixels)]})
        bright = np.asarray(data["img"][0])[..., 0].astype(float)
        rows, columns = np.indices(bright.shape)
        centre = np.array([(columns * bright).sum(), (rows * bright).sum()]) / bright.sum() + 0.5
        matrix = data["img_aug_matrix"][0]
        # the resized image has a whole number of pixels, which the matrix does not know of: less than one at the edge
        np.testing.assert_allclose((matrix @ [200.5, 160.5, 0, 1])[:2], centre, atol=1.0)
        mirrored.add(bool(np.linalg.det(matrix[:2, :2]) < 0))
    assert mirrored == {True, False}


def test_images_smaller_than_the_crop_are_padded_with_black():
    image = Image.fromarray(np.full((90, 160, 3), 200, dtype=np.uint8))
    data = ImageAug3D([64, 128], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0], False, False)({"img": [image]})
    pixels = np.asarray(data["img"][0])
    assert pixels.shape == (64, 128, 3)
    assert (pixels[19:, :80] == 200).all()
    assert not pixels[:19].any()
    assert not pixels[:, 80:].any()


def test_normalisation_is_exact_for_every_level():
    levels = np.arange(256, dtype=np.uint8)
    image = Image.fromarray(np.stack([levels, levels[::-1], np.roll(levels, 9)], axis=-1)[None])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    out = ImageNormalize(mean, std)({"img": [image, image]})["img"]
    assert out.shape == (2, 3, 1, 256)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(out[1], expected, rtol=0, atol=0)


def test_grey_images_load_as_rgb(tmp_path):
    Image.fromarray(np.full((20, 30), 77, dtype=np.uint8)).save(tmp_path / "grey.png")
    data = LoadMultiViewImageFromFiles()({"image_paths": [str(tmp_path / "grey.png")]})
    assert np.asarray(data["img"][0]).shape == (20, 30, 3)
    assert data["ori_shape"] == (30, 20)


def test_unknown_decoder_is_refused():
    with pytest.raises(InputError, match="decoder 'gpu' is not one of libjpeg9, pillow"):
        LoadMultiViewImageFromFiles(decoder="gpu")


def test_grid_mask_blacks_out_bars_over_height_and_width():
    images = torch.ones(2, 3, 60, 80)
    assert GridMask(True, True, 6, prob=0.0, fixed_prob=True)({"img": images})["img"] is images
    out = GridMask(True, True, 6, mode=1, prob=1.0, fixed_prob=True)({"img": images})["img"]
    mask = out[0, 0]
    assert all(torch.equal(out[i, c], mask) for i in range(2) for c in range(3))
    rows, columns = mask.amax(dim=1), mask.amax(dim=0)  # mode 1 keeps the bars
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    bars = (mask.amin(dim=1) == 1) | (mask.amin(dim=0) == 1)[:1].expand(60)
    assert bars.any()
    assert rows.any()
    assert columns.any()
    opposite = GridMask(True, False, 6, mode=0, prob=1.0, fixed_prob=True)({"img": images})["img"][0, 0]
    assert all(len(row.unique()) == 1 for row in opposite)  # horizontal bars only


def test_grid_mask_probability_grows_with_the_epochs():
    mask = GridMask(True, True, max_epoch=6, prob=0.6)
    mask.set_epoch(3)
    assert mask.prob == pytest.approx(0.3)
    fixed = GridMask(True, True, max_epoch=6, prob=0.6, fixed_prob=True)
    fixed.set_epoch(3)
    assert fixed.prob == 0.6


# --- points


def cloud(tmp_path, points, name="cloud.bin"):
    path = tmp_path / name
    np.asarray(points, dtype="<f4").tofile(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
@pytest.mark.parametrize("columns", [4, 5])
def test_points_load_with_four_or_five_columns(tmp_path, columns, suffix):
    points = np.random.rand(10, columns).astype(np.float32)
    path = tmp_path / f"cloud{suffix}"
    np.save(path, points) if suffix == ".npy" else points.tofile(path)
    loader = LoadPointsFromFile("LIDAR", load_dim=columns, use_dim=columns)
    data = loader({"lidar_path": str(path)})
    np.testing.assert_array_equal(data["points"].tensor, points)
    data |= {"sweeps": [], "timestamp": 0}
    out = LoadPointsFromMultiSweeps(2, columns, columns, pad_empty_sweeps=True)(data)["points"].tensor
    assert out.shape == (30, columns)
    np.testing.assert_array_equal(out[10:20, :4], points[:, :4])
    assert columns == 4 or not out[:, 4].any()


def test_columns_can_be_chosen(tmp_path):
    points = np.random.rand(10, 5).astype(np.float32)
    data = LoadPointsFromFile("LIDAR", 5, [0, 1, 2, 4])({"lidar_path": cloud(tmp_path, points)})
    np.testing.assert_array_equal(data["points"].tensor, points[:, [0, 1, 2, 4]])
    with pytest.raises(InputError, match="needs more than load_dim=4 columns"):
        LoadPointsFromFile("LIDAR", 4, 5)


def test_sweeps_are_moved_into_the_keyframe(tmp_path):
    key = np.array([[10, 0, 0, 5, 9], [0.5, 0.5, 0, 6, 9]])
    sweep = np.array([[3, 4, 1, 7, 9], [0.5, 0.9, 2, 8, 9], [0.5, 1.0, 2, 8, 9]])
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    data = LoadPointsFromFile("LIDAR", 5, 5)({"lidar_path": cloud(tmp_path, key)})
    data |= {
        "timestamp": 2_000_000,
        "sweeps": [
            {
                "data_path": cloud(tmp_path, sweep, "sweep.bin"),
                "timestamp": 1_750_000,
                "sensor2lidar_rotation": turn,
                "sensor2lidar_translation": np.array([1.0, 2, 3]),
            }
        ],
    }
    out = LoadPointsFromMultiSweeps(9, 5, 5, pad_empty_sweeps=True, remove_close=True)(data)["points"].tensor
    expected = [[10, 0, 0, 5, 0], [0.5, 0.5, 0, 6, 0], [-3, 5, 4, 7, 0.25], [0, 2.5, 5, 8, 0.25]]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_sweeps_are_the_nearest_in_test_mode_and_random_in_training(tmp_path):
    sweeps = [
        {
            "data_path": cloud(tmp_path, [[5, 5, 0, 0, 0]], f"{i}.bin"),
            "timestamp": -i * 1_000_000,
            "sensor2lidar_rotation": np.eye(3),
            "sensor2lidar_translation": np.zeros(3),
        }
        for i in range(12)
    ]

    def lags(in_test, **options):
        data = LoadPointsFromFile("LIDAR", 5, 5)({"lidar_path": cloud(tmp_path, [[9, 9, 0, 0, 0]])})
        data |= {"timestamp": 0, "sweeps": sweeps, "test_mode": in_test}
        return LoadPointsFromMultiSweeps(9, 5, 5, **options)(data)["points"].tensor[1:, 4].tolist()

    nearest = [float(i) for i in range(9)]
    assert lags(True) == nearest
    assert lags(False, test_mode=True) == nearest
    assert len(set(lags(False))) == 9
    assert {tuple(sorted(lags(False))) for _ in range(10)} != {tuple(nearest)}


def test_objects_at_rest_stay_in_their_boxes_through_all_sweeps(tiny, golden):
    """Ego motion is compensated: clouds written from a moving car agree with the annotations of the keyframe."""
    cfg = dataset_config(reference_config(golden), "test", tiny, tiny / "nuscenes_infos_train.pkl", **small_steps())
    dataset = build_dataset(cfg)
    data = dataset[len(dataset) - 1]
    boxes, points = data["gt_bboxes_3d"].data, data["points"].data
    assert len(dataset.data_infos[-1].sweeps.paths) == 6
    names = [CLASSES[label] for label in data["gt_labels_3d"].data]
    for category, name in ((1, "pedestrian"), (2, "traffic_cone")):
        box = boxes[names.index(name)]
        inside = inside_box(points, box.tensor[0])
        assert inside.sum() == 7 * OBJECTS[category][-1]
        assert points[inside, 4].unique().numel() == 7
    car = inside_box(points, boxes[names.index("car")].tensor[0])
    assert 40 <= car.sum() < 7 * 40  # it drives: the points of earlier sweeps trail behind


def inside_box(points, box):
    offset = points[:, :3] - box[:3] - torch.tensor([0, 0, box[5] / 2])
    cos, sin = box[6].cos(), box[6].sin()
    local = torch.stack(
        [offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin, offset[:, 2]]
    )
    return (local.abs() <= box[3:6, None] / 2 + 1e-3).all(dim=0)


def test_beams_are_told_by_elevation():
    angles = 0.1862 - 0.012 - 0.023275 * (np.arange(1, 31) - 0.5)  # between the edges of the beams 1..30
    points = np.column_stack([np.cos(angles) * 20, np.zeros(30), np.sin(angles) * 20]).astype(np.float32)
    for beams, kept in ((16, range(1, 31, 2)), (4, (7, 9, 11, 13)), (1, (9,))):
        np.testing.assert_array_equal(reduce_beams(points, beams), points[[k - 1 for k in kept]])
    assert len(reduce_beams(np.zeros((3, 5), dtype=np.float32), 16)) == 0
    with pytest.raises(InputError, match="reduce_beams=8 is not one of 32, 16, 4, 1"):
        reduce_beams(points, 8)


def test_virtual_points_are_refused():
    with pytest.raises(InputError, match="load_augmented='mvp'"):
        LoadPointsFromFile("LIDAR", 5, 5, load_augmented="mvp")


# --- the scene


def scene():
    points = np.random.uniform(-40, 40, (200, 5)).astype(np.float32)
    boxes = np.random.uniform(1, 5, (20, 9))
    boxes[:, :3] = np.random.uniform(-40, 40, (20, 3))
    boxes[:, 6] = np.random.uniform(-3, 3, 20)
    return {
        "points": LiDARPoints(points, points_dim=5),
        "gt_bboxes_3d": LiDARInstance3DBoxes(boxes, box_dim=9),
        "gt_labels_3d": np.arange(20),
    }


@pytest.mark.parametrize("masks", [False, True])
def test_augmentation_matrix_moves_points_boxes_and_velocities(masks):
    seen = set()
    for _ in range(12):
        data = scene()
        points, boxes = data["points"].tensor.numpy().copy(), data["gt_bboxes_3d"].clone()
        if masks:
            data["gt_masks_bev"] = np.random.randint(0, 2, (2, 8, 8))
        before = data.get("gt_masks_bev")
        pipeline = Compose([GlobalRotScaleTrans([0.9, 1.1], [-0.8, 0.8], 0.5, True), RandomFlip3D()])
        data = pipeline(data)
        matrix = data["lidar_aug_matrix"]
        assert matrix.dtype == np.float32
        np.testing.assert_allclose(data["points"].tensor[:, :3], transformed(matrix, points[:, :3]), atol=1e-4)
        np.testing.assert_array_equal(data["points"].tensor[:, 3:], points[:, 3:])
        corners = transformed(matrix, boxes.corners.numpy())
        np.testing.assert_allclose(sorted_rows(data["gt_bboxes_3d"].corners), sorted_rows(corners), atol=3e-3)
        velocities = boxes.tensor[:, 7:].numpy() @ matrix[:2, :2].T
        np.testing.assert_allclose(data["gt_bboxes_3d"].tensor[:, 7:], velocities, atol=1e-4)
        heading = np.stack([boxes.yaw.cos(), boxes.yaw.sin()], 1) @ matrix[:2, :2].T
        yaw = data["gt_bboxes_3d"].yaw
        np.testing.assert_allclose(np.arctan2(*heading.T[::-1]), torch.atan2(yaw.sin(), yaw.cos()), atol=1e-4)
        # the z column keeps its sign; those of x and y tell the flips
        flips = tuple(np.sign(np.diag(matrix)[:2]))
        seen.add(flips)
        if masks:
            axes = [1 if axis == 0 else 2 for axis in range(2) if flips[axis] < 0]
            np.testing.assert_array_equal(data["gt_masks_bev"], np.flip(before, axes))
    assert len(seen) == 4


def test_nothing_is_augmented_in_testing():
    data = scene()
    points = data["points"].tensor.clone()
    out = GlobalRotScaleTrans([0.9, 1.1], [-0.8, 0.8], 0.5, False)(data)
    assert torch.equal(out["points"].tensor, points)
    np.testing.assert_array_equal(out["lidar_aug_matrix"], np.eye(4))


def test_range_filter_drops_boxes_and_limits_yaws():
    boxes = np.zeros((4, 9))
    boxes[:, 3:6] = 1
    boxes[:, 0] = [0, 54, -53.9, 3]
    boxes[:, 1] = [0, 0, 53.9, -54]
    boxes[:, 6] = [4, 0, -4, 0]
    data = {"gt_bboxes_3d": LiDARInstance3DBoxes(boxes, box_dim=9), "gt_labels_3d": np.array([1, 2, 3, 4])}
    out = ObjectRangeFilter([-54, -54, -5, 54, 54, 3])(data)
    assert out["gt_labels_3d"].tolist() == [1, 3]
    np.testing.assert_allclose(out["gt_bboxes_3d"].yaw, [4 - 2 * np.pi, 2 * np.pi - 4], atol=1e-6)


# --- maps, formatting


class StubMap:
    def get_map_mask(self, patch_box, patch_angle, layer_names, canvas_size):
        self.request = patch_box, patch_angle, layer_names, canvas_size
        masks = np.zeros((len(layer_names), *canvas_size), dtype=np.uint8)
        for number in range(len(layer_names)):
            masks[number, number, 2 * number] = 1
        return masks


def test_map_masks_are_asked_for_around_the_augmented_car(tmp_path):
    (tmp_path / "maps" / "expansion").mkdir(parents=True)
    loader = LoadBEVSegmentation(str(tmp_path), [-50, 50, 10.0], [-40, 40, 10.0], ["divider", "walkway"])
    loader.maps["here"] = stub = StubMap()
    yaw = 0.3
    ego2global = np.eye(4)
    ego2global[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    ego2global[:2, 3] = [100, 200]
    lidar_aug = np.diag([1.0, 1, 1, 1])
    lidar_aug[0, 3] = -2  # the origin of the augmented frame lies 2 m ahead
    data = {"ego2global": ego2global, "lidar2ego": np.eye(4), "lidar_aug_matrix": lidar_aug, "location": "here"}
    masks = loader(data)["gt_masks_bev"]
    box, angle, layers, canvas = stub.request
    np.testing.assert_allclose(box, [100 + 2 * np.cos(yaw), 200 + 2 * np.sin(yaw), 80, 100])
    assert angle == pytest.approx(np.degrees(yaw))
    assert canvas == (8, 10)
    assert layers == ["lane_divider", "road_divider", "walkway"]
    expected = np.zeros((2, 10, 8), dtype=np.int64)
    expected[0, 0, 0] = expected[0, 2, 1] = expected[1, 4, 2] = 1
    np.testing.assert_array_equal(masks, expected)
    with pytest.raises(InputError, match=r"expansion/elsewhere.json does not exist"):
        loader({**data, "location": "elsewhere"})
    with pytest.raises(InputError, match="gives no 'location'"):
        loader({**data, "location": None})


def test_without_maps_no_masks_are_made_and_it_is_logged_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "bevfusion"):
        loader = LoadBEVSegmentation(str(tmp_path), [-50, 50, 0.5], [-50, 50, 0.5], ["divider"])
        data = [loader({"location": "here"}) for _ in range(3)]
    assert "gt_masks_bev" not in data[0]
    assert len([record for record in caplog.records if "no map expansion" in record.message]) == 1
    collected = Collect3D(["gt_masks_bev", "img"])({"img": 1})
    assert collected.keys() == {"img", "metas"}
    with pytest.raises(InputError, match="no transform of the pipeline makes img"):
        Collect3D(["img"])({})


def test_formatting_keeps_what_the_model_takes():
    data = {**scene(), "img": torch.zeros(2, 3, 4, 5), "token": "t", "camera2ego": np.zeros((2, 4, 4), np.float32)}
    data = DefaultFormatBundle3D(CLASSES)(data)
    out = Collect3D(["img", "points", "gt_bboxes_3d", "gt_labels_3d"], ["camera2ego", "lidar2ego"])(data)
    assert out.keys() == {"img", "points", "gt_bboxes_3d", "gt_labels_3d", "camera2ego", "metas"}
    assert out["img"].stack
    assert out["camera2ego"].data.shape == (2, 4, 4)
    assert out["gt_labels_3d"].data.dtype == torch.int64
    assert out["gt_bboxes_3d"].cpu_only
    assert out["metas"].data == {"token": "t"}


def test_mmdet3ds_transforms_serve_where_there_is_none_of_ours(tiny, golden):
    cfg = dataset_config(reference_config(golden), "train", tiny, tiny / "nuscenes_infos_train.pkl", **small_steps())
    transforms = {type(t).__name__: type(t).__module__.split(".")[0] for t in build_dataset(cfg).pipeline.transforms}
    theirs = {name for name, package in transforms.items() if package == "mmdet3d"}
    assert theirs == {"LoadAnnotations3D", "PointsRangeFilter", "ObjectNameFilter", "PointShuffle"}


def test_unknown_transform_is_refused(tiny):
    with pytest.raises(InputError, match=r"unknown pipeline type 'ImageAug3d'.*ImageAug3D"):
        NuScenesDataset(tiny / "nuscenes_infos_train.pkl", [{"type": "ImageAug3d"}])
