"""LiDAR and cameras of the synthetic world see the same scene, and each of them sees it where it is."""

import json
import re

import cv2
import numpy as np
import pytest

from bevfusion.synthetic.build import build_scene
from bevfusion.synthetic.camera import Camera, rasterise
from bevfusion.synthetic.capture import sensor_pose, take_sweep
from bevfusion.synthetic.geometry import MAX_FACES, NOBODY, Skin, box, prism, solids_from
from bevfusion.synthetic.lidar import COLUMNS, PERIOD, RANGE_NOISE
from bevfusion.synthetic.options import Options
from bevfusion.synthetic.rig import CAMERAS, LIDAR, NATIVE_SIZE, Pose, rotation_matrix
from bevfusion.synthetic.scene import MARGIN

SIZE = (800, 450)
OPTIONS = Options("v1.0-mini", 1, 1, 13, SIZE, 3, 2, 0, False)
TIME = 3.0


@pytest.fixture(scope="module")
def scene():
    return build_scene(OPTIONS.seed, "scene-0061", OPTIONS.duration)


@pytest.fixture(scope="module")
def sweep(scene):
    return take_sweep(scene, OPTIONS, TIME)


def placed_points(scene, sweep, t=TIME):
    """Points in the coordinates of the view around the ego vehicle."""
    pose, centre = sensor_pose(scene, LIDAR, t)
    return sweep.points[:, :3].astype(np.float64) @ pose.rotation.T + pose.position, centre


def camera_at(scene, sensor, t):
    pose, centre = sensor_pose(scene, sensor, t)
    return Camera(sensor.matrix(SIZE), SIZE, pose), centre


def test_sweep_has_the_format_of_nuscenes(sweep):
    points = sweep.points
    assert points.dtype == np.float32
    assert points.shape[1] == 5
    assert 15_000 < len(points) <= 32 * COLUMNS
    assert set(np.unique(points[:, 4])) == set(range(32))
    assert points[:, 3].min() >= 0
    assert points[:, 3].max() <= 255
    distance = np.linalg.norm(points[:, :3], axis=1)
    elevation = np.degrees(np.arcsin(points[:, 2] / distance))
    np.testing.assert_allclose(elevation, -30.67 + points[:, 4] * 41.34 / 31, atol=0.01)


def test_ground_returns_lie_on_the_ground(scene, sweep):
    points, _ = placed_points(scene, sweep)
    ground = points[sweep.owner == NOBODY]
    assert len(ground) > 5000
    assert np.abs(ground[:, 2]).max() < 5 * RANGE_NOISE


def test_boxes_contain_the_points_of_their_objects(scene, sweep):
    points, centre = placed_points(scene, sweep)
    xyz, yaw = scene.poses(TIME)
    mine = sweep.owner >= 0
    owner = sweep.owner[mine]
    offset = points[mine] - (xyz - [*centre, 0])[owner]
    cos, sin = np.cos(yaw[owner]), np.sin(yaw[owner])
    local = np.stack(
        [cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0], offset[:, 2]], 1
    )
    size = np.array([actor.size for actor in scene.actors])[owner] + MARGIN
    inside = (np.abs(local[:, :2]) <= size[:, :2] / 2).all(axis=1) & (local[:, 2] >= 0) & (local[:, 2] <= size[:, 2])
    assert len(owner) > 2000
    assert inside.mean() > 0.995


def test_points_project_onto_their_own_objects(scene, sweep):
    """Where a camera sees a surface at the depth of a LiDAR point, it is the surface of the same object."""
    points, centre = placed_points(scene, sweep)
    same, met, tested = 0, 0, 0
    for sensor in CAMERAS:
        camera, _ = camera_at(scene, sensor, TIME)
        view = scene.view(TIME, centre)
        buffers = rasterise(view.solids, camera, len(scene.actors))
        seen = (points - camera.pose.position) @ camera.pose.rotation
        front = seen[:, 2] > 1
        u, v = (seen[front, k] / seen[front, 2] * camera.matrix[k, k] + camera.matrix[k, 2] for k in (0, 1))
        inside = (u >= 0) & (u < SIZE[0]) & (v >= 0) & (v < SIZE[1])
        u, v = u[inside].astype(int), v[inside].astype(int)
        depth, owner = seen[front][inside, 2], sweep.owner[front][inside]
        actor = owner >= 0
        depth_there = 1 / np.maximum(buffers.inverse[v, u], 1e-6)
        close = np.abs(depth_there - depth) < 0.15 + 0.01 * depth
        tested += actor.sum()
        met += (close & actor).sum()
        same += (buffers.owners(view.solids)[v, u] == owner)[close & actor].sum()
    assert tested > 2000
    # The rest is what one sensor sees past another object, and thin parts between two pixels.
    assert met / tested > 0.85
    assert same / met > 0.985


def test_camera_delays_shift_projections_by_motion_only(scene):
    """At its own time a camera's picture of a standing object is where the annotated box projects to."""
    sensor = CAMERAS[0]
    camera, centre = camera_at(scene, sensor, TIME + sensor.delay)
    view = scene.view(TIME + sensor.delay, centre)
    owners = rasterise(view.solids, camera, len(scene.actors)).owners(view.solids)
    xyz, yaw = scene.poses(TIME)
    checked = 0
    for i, actor in enumerate(scene.actors):
        v, u = np.nonzero(owners == i)
        if len(u) < 40 or actor.motion.speed > 0:
            continue
        corners = np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (0, 1)]) * actor.size
        cos, sin = np.cos(yaw[i]), np.sin(yaw[i])
        corners = corners @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + xyz[i] - [*centre, 0]
        seen = (corners - camera.pose.position) @ camera.pose.rotation
        if seen[:, 2].min() < 0.5:
            continue
        pixels = seen @ camera.matrix.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        assert u.min() >= pixels[:, 0].min() - 1
        assert u.max() <= pixels[:, 0].max() + 1
        assert v.min() >= pixels[:, 1].min() - 1
        assert v.max() <= pixels[:, 1].max() + 1
        checked += 1
    assert checked >= 5


def test_silhouettes_are_those_of_the_projected_corners():
    """The planes of a solid cut the same pixels out of the image as the polygon around its projected vertices."""
    skin = Skin(0, (1, 1, 1), 0.5)
    parts = [box((8, 10), (-3, -1), (0.5, 2), skin), prism((14, 2, 1.2), (1.2, 0.4), 2.4, skin, sides=7)]
    solids = solids_from(parts, [0, 1])
    pose = Pose(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]), np.array([0.0, 0, 1.5]))
    camera = Camera(CAMERAS[0].matrix(SIZE), SIZE, pose)
    buffers = rasterise(solids, camera, 2)
    owners = buffers.owners(solids)
    for i, part in enumerate(parts):
        pixels = ((part.vertices - pose.position) @ pose.rotation) @ camera.matrix.T
        pixels = pixels[:, :2] / pixels[:, 2:] - 0.5
        mask = np.zeros(SIZE[::-1], dtype=np.uint8)
        cv2.fillConvexPoly(mask, cv2.convexHull((pixels * 256).round().astype(np.int32)), 1, shift=8)
        wrong = (owners == i) != (mask == 1)
        edge = cv2.dilate(mask, np.ones((3, 3))) != cv2.erode(mask, np.ones((3, 3)))
        assert mask.sum() > 1000
        assert not (wrong & ~edge).any()
        assert buffers.alone[i] == buffers.visible[i] == (owners == i).sum()


def test_depth_is_that_of_the_nearest_face():
    skin = Skin(0, (1, 1, 1), 0.5)
    solids = solids_from([box((9, 11), (-4, 4), (0, 3), skin), box((20, 21), (-9, 9), (0, 6), skin)], [0, 1])
    pose = Pose(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]), np.array([0.0, 0, 1.5]))
    camera = Camera(CAMERAS[0].matrix(SIZE), SIZE, pose)
    buffers = rasterise(solids, camera, 2)
    owners = buffers.owners(solids)
    np.testing.assert_allclose(1 / buffers.inverse[owners == 0], 9.0, rtol=1e-5)
    np.testing.assert_allclose(1 / buffers.inverse[owners == 1], 20.0, rtol=1e-5)
    assert 0 < buffers.visible[1] < buffers.alone[1]
    ground = buffers.face == -1
    rows = np.nonzero(ground)[0]
    expected = camera.matrix[1, 1] * 1.5 / (rows + 0.5 - camera.matrix[1, 2])
    np.testing.assert_allclose(1 / buffers.inverse[ground], expected, rtol=1e-4)
    assert (buffers.face[buffers.face >= 0] % MAX_FACES < 6).all()


def test_motion_within_a_sweep_is_that_of_the_vehicle(scene):
    """Raw points of a moving sensor, each moved by its own age, lie on the standing world; unmoved they do not."""
    moving = Options("v1.0-mini", 1, 1, 13, SIZE, 3, 2, 0, True)
    t = 1.0
    sweep = take_sweep(scene, moving, t)
    pose, centre = sensor_pose(scene, LIDAR, t)
    speed = float(scene.ego.motion.speed_at(t))
    assert speed > 3
    still = sweep.owner < 0
    still &= sweep.owner != NOBODY
    xyz = sweep.points[still, :3].astype(np.float64)
    column = (np.arctan2(xyz[:, 0], xyz[:, 1]) + np.pi / 2) % (2 * np.pi) / (2 * np.pi)
    age = PERIOD * (1 - column)
    _, yaw = scene.ego.motion.pose(scene.road, t)
    ahead = np.array([np.cos(yaw), np.sin(yaw), 0])
    raw = xyz @ pose.rotation.T + pose.position
    solids = scene.view(t, centre).solids
    solids = solids[solids.owner < 0]

    def off_surface(points):
        outside = np.einsum("nki,pi->pnk", solids.normals, points) - solids.offsets
        return np.abs(outside.max(axis=-1)).min(axis=-1)

    sample = np.random.default_rng(0).choice(len(raw), 600, replace=False)
    moved = off_surface((raw - speed * age[:, None] * ahead)[sample])
    unmoved = off_surface(raw[sample])
    # Walls along the street don't show a shift along the street; those across it do.
    assert np.percentile(moved, 97) < 4 * RANGE_NOISE
    assert np.percentile(unmoved, 97) > 6 * RANGE_NOISE


def test_the_rig_is_that_of_nuscenes(golden):
    """Calibration and trigger times of the real keyframe that comes with the reference data."""
    info = json.loads((golden / "realframe_info.json").read_text())["infos"][0]
    np.testing.assert_allclose(LIDAR.translation, info["lidar2ego_translation"], atol=1e-9)
    np.testing.assert_allclose(rotation_matrix(LIDAR.rotation), rotation_matrix(info["lidar2ego_rotation"]), atol=1e-9)
    assert {camera.channel for camera in CAMERAS} == set(info["cams"])
    for camera in CAMERAS:
        real = info["cams"][camera.channel]
        np.testing.assert_allclose(camera.translation, real["sensor2ego_translation"], atol=1e-9)
        expected = rotation_matrix(real["sensor2ego_rotation"])
        np.testing.assert_allclose(rotation_matrix(camera.rotation), expected, atol=1e-9)
        np.testing.assert_allclose(camera.matrix(NATIVE_SIZE), real["camera_intrinsics"], atol=1e-9)
        half = np.array(real["camera_intrinsics"]) * [[0.5], [0.5], [1]]
        np.testing.assert_allclose(camera.matrix(SIZE), half, atol=1e-9)
        taken = int(re.search(r"__(\d{16})\.jpg", real["data_path"]).group(1))
        assert camera.delay == pytest.approx((taken - info["timestamp"]) / 1e6, abs=1e-6)
