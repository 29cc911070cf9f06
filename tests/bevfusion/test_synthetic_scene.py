"""The street of the synthetic world: shapes, motion, and who stands where."""

import numpy as np
import pytest
from shapely.geometry import Polygon
from shapely.strtree import STRtree

from bevfusion.synthetic.build import build_scene
from bevfusion.synthetic.motion import Motion
from bevfusion.synthetic.population import KINDS, Street
from bevfusion.synthetic.rig import quaternion, rotation_matrix
from bevfusion.synthetic.road import Road

DURATION = 6.0


@pytest.fixture(scope="module", params=["scene-0061", "scene-0103"])
def scene(request):
    return build_scene(7, request.param, DURATION)


def footprints(scene, t, margin=0.0):
    """Rectangles of all actors at time `t`."""
    xyz, yaw = scene.poses(t)
    half = np.array([actor.size[:2] for actor in scene.actors]) / 2 + margin
    signs = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)])
    local = signs * half[:, None]
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x = xyz[:, :1] + cos * local[..., 0] - sin * local[..., 1]
    y = xyz[:, 1:2] + sin * local[..., 0] + cos * local[..., 1]
    return [Polygon(corners) for corners in np.stack([x, y], axis=-1)]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_fill_their_size_exactly(kind):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        size = Street(road=None, times=np.zeros(1), rng=rng).size(kind)
        vertices = np.concatenate([part.vertices for part in KINDS[kind].shape(size, rng)])
        length, width, height = size
        np.testing.assert_allclose(vertices.min(axis=0), [-length / 2, -width / 2, 0], atol=1e-6)
        np.testing.assert_allclose(vertices.max(axis=0), [length / 2, width / 2, height], atol=1e-6)


def test_solids_are_convex_and_their_planes_face_outwards(scene):
    solids = scene.moving
    distance = np.einsum("nki,nvi->nkv", solids.normals, solids.vertices) - solids.offsets[..., None]
    assert distance.max() < 1e-6
    # Every face passes through at least three vertices.
    assert ((np.abs(distance) < 1e-6).sum(axis=-1) >= 3).all()


@pytest.mark.parametrize("curvature", [0.0, 1 / 280, -1 / 280])
def test_road_coordinates_invert(curvature):
    road = Road(np.array([300.0, 700.0]), 2.5, curvature, 3.5, 4.5, 20.0, 50.0)
    rng = np.random.default_rng(0)
    s, d = rng.uniform(-250, 250, 500), rng.uniform(-60, 60, 500)
    back = road.to_road(*road.to_world(s, d).T)
    np.testing.assert_allclose(back[0], s, atol=1e-9)
    np.testing.assert_allclose(back[1], d, atol=1e-9)


def test_braking_stops_after_the_distance_that_physics_gives():
    motion = Motion(0.0, -5.0, 0.0, speed=6.0, brake_at=2.0, brake=3.0)
    assert motion.distance(10.0) == pytest.approx(6 * 2 + 6**2 / (2 * 3))
    assert motion.speed_at(3.0) == pytest.approx(3.0)
    assert motion.speed_at(4.5) == 0.0
    step = 1e-5
    for t in (0.5, 2.7, 3.9):
        slope = (motion.distance(t + step) - motion.distance(t - step)) / (2 * step)
        assert slope == pytest.approx(motion.speed_at(t), abs=1e-4)


def test_velocities_are_the_speeds_along_the_headings(scene):
    for t in (0.0, 2.3, DURATION):
        _, yaw = scene.poses(t)
        speed = np.array([actor.motion.speed_at(t) for actor in scene.actors])
        expected = speed[:, None] * np.stack([np.cos(yaw), np.sin(yaw)], axis=1)
        np.testing.assert_allclose(scene.velocities(t), expected, atol=2e-2)


def test_nothing_touches_anything_at_any_time(scene):
    for t in np.arange(-0.4, DURATION + 0.01, 0.1):
        shapes = footprints(scene, t)
        tree = STRtree(shapes)
        touching = tree.query(shapes, predicate="intersects")
        assert (touching[0] == touching[1]).all()


def test_the_ego_vehicle_keeps_clear_of_everything(scene):
    for t in np.arange(0.0, DURATION, 0.25):
        xy, yaw = scene.ego.motion.pose(scene.road, t)
        ahead = np.array([np.cos(yaw), np.sin(yaw)])
        body = Polygon(
            [xy + a * ahead + b * np.array([-ahead[1], ahead[0]]) for a, b in ((-1, -1), (3.2, -1), (3.2, 1), (-1, 1))]
        )
        assert not any(body.intersects(shape) for shape in footprints(scene, t))


def test_moving_vehicles_keep_to_their_side_of_the_road(scene):
    moving = [a.motion for a in scene.actors if a.category.startswith("vehicle") and a.motion.speed > 2]
    assert len(moving) > 5
    for motion in moving:
        assert np.cos(motion.direction) == pytest.approx(-np.sign(motion.d))
        assert abs(motion.d) < scene.road.kerb


def test_every_detection_class_occurs_near_the_drive(scene):
    kinds = {actor.category.removeprefix("human.").split(".")[0] for actor in scene.actors}
    assert "pedestrian" in kinds
    categories = {actor.category for actor in scene.actors}
    wanted = {spec.category for name, spec in KINDS.items() if name not in ("child", "worker")}
    assert wanted <= categories


def test_equal_arguments_build_equal_scenes_and_others_do_not():
    one, two, other = (build_scene(seed, "scene-0061", 2.0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.moving.vertices, two.moving.vertices)
    np.testing.assert_array_equal(one.static.vertices, two.static.vertices)
    np.testing.assert_array_equal(one.ground.labels, two.ground.labels)
    assert one.actors == two.actors
    assert one.actors != other.actors


def test_attributes_follow_the_motion(scene):
    for actor in scene.actors:
        attribute, moving = actor.attribute(1.0), actor.motion.speed_at(1.0) > 0.1
        if actor.category.startswith("movable_object"):
            assert attribute is None
        elif actor.category in ("vehicle.bicycle", "vehicle.motorcycle"):
            assert (attribute == "cycle.with_rider") == moving
        else:
            assert attribute.endswith("moving") == moving


def test_quaternions_are_those_of_the_devkit():
    from pyquaternion import Quaternion

    yaw, pitch, roll = 2.1, 0.02, -0.03
    turns = (((0, 0, 1), yaw), ((0, 1, 0), pitch), ((1, 0, 0), roll))
    expected = Quaternion()
    for axis, angle in turns:
        expected = expected * Quaternion(axis=axis, angle=angle)
    q = quaternion(yaw, pitch, roll)
    np.testing.assert_allclose(q, expected.elements, atol=1e-12)
    np.testing.assert_allclose(rotation_matrix(q), expected.rotation_matrix, atol=1e-12)
