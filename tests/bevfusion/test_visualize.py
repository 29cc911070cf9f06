"""Geometry of the drawings, and pictures of the real frame."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmdet3d.core.bbox import LiDARInstance3DBoxes

from bevfusion.boxes import legacy_to_lidar
from bevfusion.create_data.database import points_in_boxes
from bevfusion.errors import InputError
from bevfusion.visualize import (
    EDGES,
    NEAR,
    PALETTE,
    Objects,
    SensorData,
    box_corners,
    draw_birds_eye_view,
    draw_boxes,
    height_colours,
    project_segments,
    render_frame,
    write_image,
)

CLASSES = (
    *("car", "truck", "construction_vehicle", "bus", "trailer"),
    *("barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone"),
)
# a camera of 200 x 100 pixels that looks along the LiDAR's y axis
LOOKING_AHEAD = np.array([[100.0, 100, 0, 0], [0, 50, -100, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
RED = np.array([[255, 0, 0]], dtype=np.uint8)


@pytest.fixture(scope="module")
def scene(golden, realframe):
    """(frame, truth) of the real keyframe."""
    info = json.loads((golden / "realframe_info.json").read_text())["infos"][0]
    images, lidar2image = {}, {}
    for name, camera in info["cams"].items():
        images[name] = cv2.imread(str(realframe / camera["data_path"]))[..., ::-1]
        camera2lidar, intrinsics = np.eye(4), np.eye(4)
        camera2lidar[:3, :3] = camera["sensor2lidar_rotation"]
        camera2lidar[:3, 3] = camera["sensor2lidar_translation"]
        intrinsics[:3, :3] = camera["camera_intrinsics"]
        lidar2image[name] = intrinsics @ np.linalg.inv(camera2lidar)
    boxes = legacy_to_lidar(np.array(info["gt_boxes"]))
    boxes[:, 2] -= boxes[:, 5] / 2
    labels = np.array([CLASSES.index(name) if name in CLASSES else -1 for name in info["gt_names"]])
    points = np.fromfile(realframe / info["lidar_path"], "<f4").reshape(-1, 5)
    return SensorData(info["token"], images, lidar2image, points), Objects(boxes, labels)


def test_corners_are_those_of_mmdet3d():
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(-20, 20, (10, 3)), rng.uniform(0.5, 8, (10, 3)), rng.uniform(-4, 4, 10)])
    corners = box_corners(boxes)
    theirs = LiDARInstance3DBoxes(torch.tensor(boxes, dtype=torch.float32)).corners.numpy()
    for ours, reference in zip(corners, theirs, strict=True):
        distance = np.linalg.norm(ours[:, None] - reference[None], axis=-1)
        assert sorted(distance.argmin(axis=1)) == list(range(8))
        assert distance.min(axis=1).max() < 1e-4
    front = boxes[:, :2] + boxes[:, 3:4] / 2 * np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], axis=1)
    np.testing.assert_allclose(corners[:, [0, 1, 4, 5], :2].mean(axis=1), front)
    left = np.cross(np.append(front[0] - boxes[0, :2], 0), corners[0, 0] - corners[0, 1])
    assert left[2] > 0  # corner 0 is to the left of corner 1
    np.testing.assert_allclose(corners[:, :4, 2], np.tile(boxes[:, 2:3], (1, 4)))


def test_segments_are_cut_at_the_near_plane():
    ahead = [[1.0, 4, 0.5], [2, 8, -1]]
    crossing = [[0.5, 4, 0], [0.5, -4, 0]]
    behind = [[1.0, -4, 0], [1, -8, 0]]
    pixels, visible = project_segments(np.array([ahead, crossing, crossing[::-1], behind]), LOOKING_AHEAD)
    assert visible.tolist() == [True, True, True, False]
    np.testing.assert_allclose(pixels[0], [[125, 37.5], [125, 62.5]])
    np.testing.assert_allclose(pixels[1], [[112.5, 50], [100 + 50 / NEAR, 50]])
    np.testing.assert_allclose(pixels[2], pixels[1][::-1])


def test_boxes_are_drawn_where_they_are():
    # 2 m wide, 1 m high, its rear 8 m ahead, heading away from the camera
    box = np.array([[0.0, 10, -0.5, 4, 2, 1, np.pi / 2]])
    image = np.zeros((100, 200, 3), np.uint8)
    draw_boxes(image, box, LOOKING_AHEAD, RED, 1)
    for x, y in ((112, 44), (87, 56), (100, 44), (100, 56)):  # of the rear face: two corners, two edges' middles
        assert image[y - 1 : y + 2, x - 1 : x + 2, 0].max() > 200
    assert image[..., 1:].max() == 0
    assert image[:40].max() == image[60:].max() == image[:, :84].max() == image[:, 116:].max() == 0
    behind = np.zeros_like(image)
    draw_boxes(behind, box * [1, -1, 1, 1, 1, 1, 1], LOOKING_AHEAD, RED)
    assert behind.max() == 0


def test_the_box_around_the_camera_does_not_fill_the_picture():
    image = np.zeros((100, 200, 3), np.uint8)
    draw_boxes(image, np.array([[0.0, 0, -1, 6, 3, 2, 0.3]]), LOOKING_AHEAD, RED)
    assert 0 < (image[..., 0] > 0).mean() < 0.3


def test_birds_eye_view_has_y_upwards_and_colours_by_height():
    points = np.array([[10.2, 20.2, 1.0], [10.2, 20.2, -1.0], [-30.2, -40.2, -2.0], [90.0, 0.0, 0.0]])
    view = draw_birds_eye_view(points, [], size=1000, reach=50)
    for pixel, height in (((298, 602), 1.0), ((902, 198), -2.0)):  # (row, column); the higher of two points is on top
        np.testing.assert_array_equal(view[pixel], height_colours(np.array([height]))[0])
    box = np.array([[20.0, 20, 0, 10, 4, 2, np.pi / 2]])  # heading upwards
    boxed = draw_birds_eye_view(points, [(box, RED, 2)], size=1000, reach=50)
    red = (boxed == RED[0]).all(axis=-1)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((250, 350, 680, 720), abs=2)
    assert red[255:298, 700].all()  # from the middle to the front
    assert not red[303:345, 700].any()


def test_boxes_enclose_their_points_in_the_real_images(scene):
    frame, truth = scene
    centred = truth.boxes.copy()
    centred[:, 2] += centred[:, 5] / 2
    corners = box_corners(truth.boxes)
    checked = 0
    for number, members in enumerate(points_in_boxes(frame.points, centred)):
        for lidar2image in frame.lidar2image.values():
            pixels, visible = project_segments(corners[number][EDGES], lidar2image)
            edges = pixels.reshape(-1, 2)
            if not visible.all() or edges.min() < 0 or edges[:, 0].max() > 1600 or edges[:, 1].max() > 900:
                continue
            seen = np.repeat(frame.points[members, None, :3], 2, axis=1)
            hull = cv2.convexHull(edges.astype(np.float32))
            for pixel in project_segments(seen, lidar2image)[0][:, 0]:
                assert cv2.pointPolygonTest(hull, pixel.tolist(), True) > -0.5
                checked += 1
    assert checked > 300


def test_picture_of_the_real_frame(scene, tmp_path):
    frame, truth = scene
    picture = render_frame(frame, CLASSES, truth, title="FP32", camera_width=320)
    assert picture.shape == (44 + 2 * 180 + 720, 960, 3)
    assert picture.dtype == np.uint8
    # the first camera of the first row, away from its boxes and its name
    tile = cv2.resize(frame.images["CAM_FRONT_LEFT"], (320, 180), interpolation=cv2.INTER_AREA)
    assert np.abs(picture[100:150, 10:60].astype(int) - tile[56:106, 10:60]).mean() < 4
    ignored = truth.labels == -1
    assert ignored.any()
    without = render_frame(frame, CLASSES, truth.select(~ignored), title="FP32", camera_width=320)
    np.testing.assert_array_equal(picture, without)
    write_image(tmp_path / "deep" / "frame.png", picture)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "deep" / "frame.png"))[..., ::-1], picture)


def test_ground_truth_is_white_beside_detections(scene):
    frame, truth = scene
    cars = truth.select(truth.labels == 0)
    empty = Objects(np.zeros((0, 9)), np.zeros(0, dtype=int), np.zeros(0))

    def orange_and_white(*objects) -> tuple[int, int]:
        view = render_frame(frame, CLASSES, *objects, camera_width=320)[404:, 240:]
        return (view == PALETTE[0]).all(axis=-1).sum(), (view == 255).all(axis=-1).sum()

    base_orange, base_white = orange_and_white(None, empty)
    truth_orange, truth_white = orange_and_white(cars, None)
    both_orange, both_white = orange_and_white(cars, empty)
    assert truth_orange > base_orange + 100
    assert truth_white == base_white
    assert both_orange == base_orange
    assert both_white > base_white + 100


def test_a_frame_without_cameras_is_drawn(scene):
    frame, truth = scene
    picture = render_frame(SensorData("t", {}, {}, frame.points), CLASSES, truth, camera_width=160)
    assert picture.shape == (44 + 180 + 360, 480, 3)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write the picture"):
        write_image(tmp_path / "file" / "frame.png", np.zeros((4, 4, 3), np.uint8))
