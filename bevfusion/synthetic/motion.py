"""Where objects are at any time: motion along straight lines in road coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from bevfusion.synthetic.road import Road


@dataclass(frozen=True)
class Motion:
    """A start (s, d) at time 0, a direction in road coordinates (rad, 0 along +s), a speed, and perhaps a stop.

    From `brake_at` seconds on the speed falls by `brake` m/s^2 until the object stands. The fields may be arrays (A,),
    then it is the motion of A objects, and the methods take one time for all of them.
    """

    s: float | np.ndarray
    d: float | np.ndarray
    direction: float | np.ndarray
    speed: float | np.ndarray = 0.0
    brake_at: float | np.ndarray = np.inf
    brake: float | np.ndarray = 2.5

    @classmethod
    def stack(cls, motions: Sequence["Motion"]) -> "Motion":
        """The motion of several objects at once."""
        return cls(**{f.name: np.array([getattr(m, f.name) for m in motions]) for f in fields(cls)})

    def distance(self, t: np.ndarray | float) -> np.ndarray:
        """Metres driven since time 0."""
        t = np.asarray(t, dtype=np.float64)
        braking = np.clip(t - self.brake_at, 0.0, self.speed / self.brake)
        return self.speed * (np.minimum(t, self.brake_at) + braking) - 0.5 * self.brake * braking**2

    def speed_at(self, t: np.ndarray | float) -> np.ndarray:
        """Speed in m/s."""
        return np.maximum(self.speed - self.brake * np.maximum(np.asarray(t) - self.brake_at, 0.0), 0.0)

    def pose(self, road: Road, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Position (..., 2) in metres and yaw (...) in radians, both global, at times `t` in seconds."""
        driven = self.distance(t)
        # A metre at offset d spans more or less than a metre of the centre line of a bend.
        s = self.s + driven * np.cos(self.direction) / (1 - road.curvature * self.d)
        d = self.d + driven * np.sin(self.direction)
        return road.to_world(s, d), road.direction(s) + self.direction


def boxes_overlap(
    centre: np.ndarray, yaw: np.ndarray, half: np.ndarray, centres: np.ndarray, yaws: np.ndarray, halves: np.ndarray
) -> np.ndarray:
    """Whether rectangles overlap, by the separating axis theorem: bool, shape (M, T).

    One moving rectangle: centre (T, 2), yaw (T,), half sizes (2,); against M others: (M, T, 2), (M, T), (M, 2).
    """
    gap = centres - centre
    turn = yaws - yaw
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    apart = np.zeros(turn.shape, dtype=bool)
    others = halves[:, None, :]
    for angle, mine, theirs in ((yaw, half, others), (yaws, others, half)):
        c, s = np.cos(angle), np.sin(angle)
        along = np.abs(gap[..., 0] * c + gap[..., 1] * s)
        across = np.abs(gap[..., 1] * c - gap[..., 0] * s)
        apart |= along > mine[..., 0] + theirs[..., 0] * cos + theirs[..., 1] * sin
        apart |= across > mine[..., 1] + theirs[..., 0] * sin + theirs[..., 1] * cos
    return ~apart
