"""One scene of the world: a street, the ego vehicle's drive, everything that stands and moves, and the light."""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from bevfusion.synthetic.geometry import Solids, concatenate
from bevfusion.synthetic.motion import Motion
from bevfusion.synthetic.rig import quaternion
from bevfusion.synthetic.road import GroundMap, Road

REACH = 100.0  # metres around the ego vehicle beyond which nothing is sensed
MARGIN = np.array([0.10, 0.10, 0.05])  # metres by which an annotated box is larger than the object


@dataclass(frozen=True)
class Actor:
    """An annotated object: nuScenes category, physical size (length, width, height) in metres and motion.

    `parked` tells parked from stopped vehicles, `rider` cycles with a rider from those without.
    """

    category: str
    size: tuple[float, float, float]
    motion: Motion
    parked: bool = False
    rider: bool = False

    def attribute(self, t: float) -> str | None:
        """The nuScenes attribute at time `t`; None for cones and barriers, which have none."""
        moving = self.motion.speed_at(t) > 0.1
        if self.category.startswith("human"):
            return "pedestrian.moving" if moving else "pedestrian.standing"
        if self.category in ("vehicle.bicycle", "vehicle.motorcycle"):
            return "cycle.with_rider" if self.rider else "cycle.without_rider"
        if self.category.startswith("vehicle"):
            return "vehicle.moving" if moving else "vehicle.parked" if self.parked else "vehicle.stopped"
        return None


@dataclass(frozen=True)
class Light:
    """Sun and sky: `sun` (3,) unit vector towards the sun, RGB strengths, `exposure`, and strength of lamps."""

    sun: np.ndarray
    sun_rgb: np.ndarray
    ambient_rgb: np.ndarray
    zenith_rgb: np.ndarray
    horizon_rgb: np.ndarray
    lamps: float
    dusk: bool


def draw_light(rng: np.random.Generator) -> Light:
    """Day (three of four scenes) or dusk, with a random direction of the sun and haze."""
    dusk = bool(rng.random() < 0.25)
    height = np.radians(rng.uniform(8, 18) if dusk else rng.uniform(28, 65))
    azimuth = rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)])
    warm = np.array([1.0, 0.72, 0.48]) if dusk else np.array([1.0, 0.97, 0.90])
    cloud = rng.uniform(0.0, 0.6)
    if dusk:
        ambient, zenith, horizon = (0.37, 0.37, 0.46), (0.20, 0.25, 0.46), (0.86, 0.58, 0.42)
    else:
        ambient, zenith, horizon = (0.50, 0.53, 0.60), (0.30, 0.50, 0.82), (0.80, 0.86, 0.92)
    grey = np.array([0.72, 0.74, 0.77]) * (0.6 if dusk else 1.0)
    mix = [(1 - cloud) * np.array(rgb) + cloud * grey for rgb in (zenith, horizon)]
    strength = (0.40 if dusk else 0.62) * (1 - 0.5 * cloud)
    return Light(sun, warm * strength, np.array(ambient), mix[0], mix[1], 1.6 if dusk else 1.0, dusk)


@dataclass(frozen=True)
class EgoDrive:
    """The ego vehicle's motion, with a little pitch and roll of the body."""

    motion: Motion
    sway: np.ndarray  # (2, 3): amplitude rad, frequency rad/s, phase rad of roll and pitch

    def pose(self, road: Road, t: float) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """Translation (3,) and quaternion from the ego frame to the global frame at time `t` in seconds."""
        xy, yaw = self.motion.pose(road, t)
        roll, pitch = self.sway[:, 0] * np.sin(self.sway[:, 1] * t + self.sway[:, 2])
        return np.array([xy[0], xy[1], 0.0]), quaternion(yaw, pitch, roll)


@dataclass(frozen=True)
class Scene:
    """Everything that the sensors of one scene see.

    `motion` is that of all actors at once; `moving` holds the solids of all actors in their own frames, `static` those
    of all other things in global coordinates; ``Solids.owner`` is the index of an actor, or -1 minus that of a thing.
    """

    name: str
    road: Road
    ground: GroundMap
    light: Light
    ego: EgoDrive
    actors: list[Actor]
    motion: Motion
    moving: Solids
    static: Solids

    def poses(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Positions (A, 3) on the ground and yaws (A,) of all actors, global, at time `t`."""
        xy, yaw = self.motion.pose(self.road, t)
        return np.concatenate([xy, np.zeros((len(xy), 1))], axis=1), yaw

    def velocities(self, t: float) -> np.ndarray:
        """Velocities (A, 2) of all actors in m/s, global, by differentiating their motion at `t`."""
        step = 1e-3
        return (self.poses(t + step)[0][:, :2] - self.poses(t - step)[0][:, :2]) / (2 * step)

    def view(self, t: float, centre: np.ndarray) -> "View":
        """What stands where at time `t`, in coordinates whose origin is `centre` (2,), within reach of it."""
        xyz, yaw = self.poses(t)
        origin = np.array([centre[0], centre[1], 0.0])
        near = np.hypot(*(xyz - origin)[:, :2].T) < REACH
        moving = self.moving[near[self.moving.owner]]
        moving = moving.placed((xyz - origin)[moving.owner], yaw[moving.owner])
        close = np.hypot(*(self.static.vertices[..., :2] - centre).transpose(2, 0, 1)).min(axis=1) < REACH
        static = self.static[close]
        static = static.placed(np.broadcast_to(-origin, (len(static), 3)), np.zeros(len(static)))
        return View(concatenate([moving, static]), self.road.shifted(-centre), self.ground, self.light)


@dataclass(frozen=True)
class View:
    """The world around a point at one moment: solids, and the road in the same shifted coordinates."""

    solids: Solids
    road: Road
    ground: GroundMap
    light: Light


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random generator for one purpose: equal names give equal numbers, in whatever process and order."""
    return np.random.default_rng([seed, *(crc32(str(n).encode()) for n in names)])
