"""Ray casting for a spinning 32-beam LiDAR (as Velodyne HDL-32E: +10.67 to -30.67 degrees, 20 turns a second)."""

from dataclasses import dataclass

import numpy as np

from bevfusion.synthetic.geometry import MAX_FACES, NOBODY, Solids
from bevfusion.synthetic.rig import Pose
from bevfusion.synthetic.road import REFLECT
from bevfusion.synthetic.scene import View

BEAMS, COLUMNS = 32, 1090
PERIOD = 0.05  # seconds a turn
MAX_RANGE, MIN_RANGE = 95.0, 0.9
ELEVATION = np.radians(np.linspace(-30.67, 10.67, BEAMS))
RANGE_NOISE = 0.015  # metres, standard deviation
TINY = 0.005  # solids that look smaller than this, in rad, are left out
GROUND = -1


@dataclass(frozen=True)
class Sweep:
    """points (M, 5) float32: x, y, z in the LiDAR frame (m), intensity 0..255, ring; owner (M,) as in ``Solids.owner``.

    On the ground the owner is ``geometry.NOBODY``.
    """

    points: np.ndarray
    owner: np.ndarray


def scan(view: View, pose: Pose, rng: np.random.Generator, velocity: np.ndarray | None = None) -> Sweep:
    """One turn of the LiDAR, clockwise from the left, ending at the time of the view.

    With `velocity` (A, 2), that of every owner in m/s, sensor and owners move during the turn, and the points are as
    the sensor saw them (not compensated): every solid is met where it is when the beams point at its middle. Without,
    time stands still.
    """
    azimuth = -np.pi / 2 + 2 * np.pi * (np.arange(COLUMNS) + rng.uniform()) / COLUMNS
    local = _directions(azimuth)
    age = np.zeros(COLUMNS) if velocity is None else PERIOD * (1 - (np.arange(COLUMNS) + 1) / COLUMNS)
    rays = _Rays.cast(local, pose, age)
    sectors = _Sectors.of(view.solids, azimuth, pose)
    drift = np.zeros((len(view.solids), 3))
    if velocity is not None:
        actors = view.solids.owner >= 0
        drift[actors, :2] = velocity[view.solids.owner[actors]]
    since = age[sectors.middle]
    origin = pose.position - (pose.velocity - drift) * since[:, None]
    inverse, face = _trace(rays, view.solids, origin, sectors)
    return _measure(view, rays, local, inverse, face, rng)


def _directions(azimuth: np.ndarray) -> np.ndarray:
    """Unit directions (3, BEAMS, COLUMNS) in the LiDAR frame."""
    cos, sin = np.cos(ELEVATION)[:, None], np.sin(ELEVATION)[:, None]
    return np.stack([cos * np.sin(azimuth), cos * np.cos(azimuth), np.broadcast_to(sin, (BEAMS, len(azimuth)))])


@dataclass(frozen=True)
class _Rays:
    """Rays in the coordinates of the view, the columns twice in a row so that any sector is one slice.

    origin (3, 2C) and direction (3, B, 2C), float32.
    """

    origin: np.ndarray
    direction: np.ndarray

    @classmethod
    def cast(cls, local: np.ndarray, pose: Pose, age: np.ndarray) -> "_Rays":
        r = pose.rotation
        x, y, z = (r[i, 0] * local[0] + r[i, 1] * local[1] + r[i, 2] * local[2] for i in range(3))
        cos, sin = np.cos(pose.yaw_rate * -age), np.sin(pose.yaw_rate * -age)
        direction = np.stack([cos * x - sin * y, sin * x + cos * y, z])
        origin = pose.position[:, None] - pose.velocity[:, None] * age
        return cls(_twice(origin), _twice(direction))


def _twice(a: np.ndarray) -> np.ndarray:
    return np.concatenate([a, a], axis=-1).astype(np.float32)


def _trace(rays: _Rays, solids: Solids, origin: np.ndarray, sectors: "_Sectors") -> tuple[np.ndarray, np.ndarray]:
    """The nearest surface along every ray: 1 / range (B, C), and face number (solid * MAX_FACES + face, or GROUND).

    `origin` (N, 3) is the sensor's position as each solid sees it. Near solids come first, so that most of the others
    are found to be hidden before any of their faces is tested.
    """
    inverse = np.maximum(-rays.direction[2] / rays.origin[2], 0.0)
    face = np.full(inverse.shape, GROUND, dtype=np.int32)
    room = solids.offsets - np.einsum("nki,ni->nk", solids.normals, origin)
    # Faces in order: those that may be entered, those that may be left, and padding.
    entering = (room < 0) & (np.arange(MAX_FACES) < solids.n_faces[:, None])
    padding = np.arange(MAX_FACES) >= solids.n_faces[:, None]
    order = np.argsort(np.where(padding, 2, ~entering), axis=1, kind="stable")
    planes = np.take_along_axis(solids.normals / room[..., None], order[..., None], axis=1)
    planes = planes.astype(np.float32)[..., None, None]
    fronts, counts = entering.sum(axis=1).tolist(), solids.n_faces.tolist()
    for i in sectors.wanted:
        beams, columns = sectors.beams[i], sectors.columns[i]
        known = inverse[beams, columns]
        if not fronts[i] or known.min() > 1 / sectors.nearest[i]:
            continue
        d = rays.direction[:, beams, columns]
        front, back = planes[i, : fronts[i]], planes[i, fronts[i] : counts[i]]
        steps = front[:, 0] * d[0] + front[:, 1] * d[1] + front[:, 2] * d[2]
        entry = steps.min(axis=0)
        leave = (back[:, 0] * d[0] + back[:, 1] * d[1] + back[:, 2] * d[2]).max(axis=0)
        hit = (entry > leave) & (entry > known)
        if hit.any():
            known[hit] = entry[hit]
            face[beams, columns][hit] = i * MAX_FACES + order[i][steps.argmin(axis=0)[hit]]
    later = inverse[:, COLUMNS:] > inverse[:, :COLUMNS]
    return (
        np.where(later, inverse[:, COLUMNS:], inverse[:, :COLUMNS]),
        np.where(later, face[:, COLUMNS:], face[:, :COLUMNS]),
    )


@dataclass(frozen=True)
class _Sectors:
    """Which beams and columns can meet each of N solids.

    beams, columns: slices; middle (N,) the column that points at a solid; nearest (N,) a lower bound of its horizontal
    distance in metres; wanted: the numbers of solids to look at, nearest first.
    """

    beams: list[slice]
    columns: list[slice]
    middle: np.ndarray
    nearest: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, solids: Solids, azimuth: np.ndarray, pose: Pose) -> "_Sectors":
        slack = 0.001 + 0.01 * np.hypot(*pose.velocity[:2])
        seen = np.einsum("nvi,ij->nvj", solids.vertices - pose.position, pose.rotation)
        flat, bearing = np.hypot(seen[..., 0], seen[..., 1]), np.arctan2(seen[..., 0], seen[..., 1])
        centre = seen.mean(axis=1)
        towards = np.arctan2(centre[:, 0], centre[:, 1])
        spread = (bearing - towards[:, None] + np.pi) % (2 * np.pi) - np.pi
        left, right = towards + spread.min(axis=1) - slack, towards + spread.max(axis=1) + slack
        radius = np.hypot(*(seen - centre[:, None])[..., :2].transpose(2, 0, 1)).max(axis=1)
        away = np.hypot(centre[:, 0], centre[:, 1])
        nearest = np.maximum(away - radius, 0.3)
        low, high = seen[..., 2].min(axis=1), seen[..., 2].max(axis=1)
        bottom = np.arctan2(low, np.where(low < 0, nearest, flat.max(axis=1)))
        top = np.arctan2(high, np.where(high > 0, nearest, flat.max(axis=1)))
        first, last = np.searchsorted(ELEVATION, bottom - 0.001), np.searchsorted(ELEVATION, top + 0.001)
        step = 2 * np.pi / COLUMNS
        start = np.floor((left - azimuth[0]) / step).astype(int) % COLUMNS
        width = np.minimum(np.ceil((right - left) / step).astype(int) + 1, COLUMNS)
        # What is much smaller than the gap between two rays is met by chance only.
        size = np.maximum(2 * radius, high - low)
        wanted = np.flatnonzero((nearest < MAX_RANGE) & (last > first) & (size > TINY * away))
        return cls(
            beams=list(map(slice, first.tolist(), last.tolist())),
            columns=list(map(slice, start.tolist(), (start + width).tolist())),
            middle=np.round((towards - azimuth[0]) / step).astype(int) % COLUMNS,
            nearest=nearest,
            wanted=wanted[np.argsort(nearest[wanted], kind="stable")],
        )


def _measure(
    view: View, rays: _Rays, local: np.ndarray, inverse: np.ndarray, face: np.ndarray, rng: np.random.Generator
) -> Sweep:
    """Turn hits into returns: reflectivity and angle decide the intensity and whether a return comes at all."""
    solids = view.solids
    # Column by column, as the sensor fires.
    column, beam = np.nonzero((inverse > 1 / MAX_RANGE).T)
    face, distance = face[beam, column], 1.0 / inverse[beam, column].astype(np.float64)
    ray = rays.direction[:, beam, column].astype(np.float64)
    on_ground = face == GROUND
    normal = solids.normals.reshape(-1, 3)[face]
    normal[on_ground] = (0.0, 0.0, 1.0)
    cosine = np.abs((normal * ray.T).sum(axis=1)).clip(0, 1)
    reflect = solids.reflect.reshape(-1)[face]
    spot = rays.origin[:2, column] + ray[:2] * distance
    s, d = view.road.to_road(spot[0, on_ground], spot[1, on_ground])
    reflect[on_ground] = REFLECT[view.ground.label_at(s, d)]
    signal = reflect * (0.25 + 0.75 * cosine)
    lost = 0.02 + 0.98 * np.exp(-60.0 * signal * (30.0 / distance) ** 2)
    kept = (rng.random(len(face)) >= lost) & (distance > MIN_RANGE)
    noisy = distance + rng.normal(0.0, RANGE_NOISE, len(face))
    intensity = (255 * signal * rng.normal(1.0, 0.08, len(face))).round().clip(0, 255)
    xyz = local[:, beam, column] * noisy
    points = np.concatenate([xyz, intensity[None], beam[None]]).T.astype(np.float32)
    owner = np.where(on_ground, NOBODY, solids.owner[face // MAX_FACES])
    return Sweep(np.ascontiguousarray(points[kept]), owner[kept])
