"""Builds the scene that belongs to a name and a seed."""

import numpy as np

from bevfusion.synthetic import population, traffic
from bevfusion.synthetic.motion import Motion
from bevfusion.synthetic.population import Street
from bevfusion.synthetic.road import GroundMap, Road
from bevfusion.synthetic.scene import EgoDrive, Scene, draw_light, generator

BEHIND = 0.6  # seconds before the first keyframe for which places are kept free, for the sweeps that lead up to it
AROUND = 115.0  # metres of street before the first and after the last keyframe


def build_scene(seed: int, name: str, duration: float) -> Scene:
    """The scene called `name` for keyframes from 0 to `duration` seconds: equal arguments give equal scenes."""
    rng = generator(seed, name)
    ego = _draw_ego(rng, duration)
    travel = float(ego.motion.distance(duration))
    road = _draw_road(rng, travel)
    ego = EgoDrive(_in_lane(ego.motion, road, rng), ego.sway)
    street = Street(road, np.arange(-BEHIND, duration + 0.3, 0.2), rng)
    street.reserve(ego.motion, 4.8, 2.1, 1.6)
    near, far = (-60.0, travel + 60.0), (-AROUND, travel + AROUND)
    traffic.work_zones(street, near)
    traffic.closed_bays(street, near)
    traffic.driving(street, ego.motion, duration)
    traffic.queue(street)
    traffic.parked(street, near)
    traffic.on_cycles(street, near, ego.motion, duration)
    traffic.on_foot(street, near, duration)
    population.build_front(street, far)
    population.furnish(street, (-80.0, travel + 80.0))
    moving, static = street.solids()
    motion = Motion.stack([actor.motion for actor in street.actors])
    return Scene(name, road, GroundMap(road, far, rng), draw_light(rng), ego, street.actors, motion, moving, static)


def _draw_ego(rng: np.random.Generator, duration: float) -> EgoDrive:
    """A drive at a steady speed; one in four brakes to a stop on the way."""
    speed = float(rng.uniform(3.5, 8.0))
    brake_at = float(rng.uniform(0.2, 0.8) * duration) if rng.random() < 0.25 else np.inf
    sway = np.stack([rng.uniform(0.0008, 0.0025, 2), rng.uniform(0.8, 2.0, 2), rng.uniform(0, 6.28, 2)], axis=1)
    return EgoDrive(Motion(0.0, 0.0, 0.0, speed, brake_at, 1.8), sway)


def _draw_road(rng: np.random.Generator, travel: float) -> Road:
    """A road that lies wholly in the quadrant of positive coordinates, as the devkit's maps expect."""
    bend = rng.choice([-1.0, 0.0, 1.0]) / rng.uniform(280, 600)
    road = Road(
        origin=np.zeros(2),
        heading=float(rng.uniform(-np.pi, np.pi)),
        curvature=float(bend),
        lane=float(rng.uniform(3.3, 3.7)),
        walk=float(rng.uniform(4.2, 5.5)),
        crossing=float(rng.uniform(-20, travel + 35)),
        zebra=float(rng.uniform(0, travel + 20)),
    )
    middle = road.to_world(np.linspace(-AROUND, travel + AROUND, 50), 0.0)
    return road.shifted((rng.uniform(80, 250, 2) - middle.min(axis=0)).round(1))


def _in_lane(motion: Motion, road: Road, rng: np.random.Generator) -> Motion:
    """The ego vehicle's motion moved into one of the two lanes of its side."""
    lane = int(rng.integers(2))
    return Motion(motion.s, road.centre(-1, lane), 0.0, motion.speed, motion.brake_at, motion.brake)
