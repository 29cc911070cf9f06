"""The street: a gently curved road in its own coordinates, and the picture that is painted on the ground.

Road coordinates are (s, d): metres along the centre line and metres to its left. Traffic keeps to the right.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import cv2
import numpy as np


class Ground(IntEnum):
    """What the ground is made of at a place."""

    GRASS = 0
    PAVING = 1
    ASPHALT = 2
    PARKING = 3
    SIDEWALK = 4
    KERB = 5
    WHITE = 6
    YELLOW = 7


COLOURS = np.array(
    [
        (0.27, 0.34, 0.16), (0.50, 0.47, 0.43), (0.26, 0.26, 0.27), (0.31, 0.30, 0.30), (0.56, 0.55, 0.52),
        (0.68, 0.67, 0.64), (0.86, 0.86, 0.84), (0.85, 0.66, 0.15),
    ],
    dtype=np.float32,
)  # fmt: skip
REFLECT = np.array([0.28, 0.16, 0.07, 0.09, 0.17, 0.24, 0.55, 0.45], dtype=np.float32)
DRIVABLE_OR_WALK = np.array([0, 0, 1, 1, 1, 1, 1, 1], dtype=bool)
SETBACK = 26.0  # metres from the centre line to the last of the painted ground that is not cross street
EDGE = 50.0  # metres to either side that are painted; what lies beyond is as the edge
BAY = 6.0  # metres, length of a parking bay


@dataclass(frozen=True)
class Road:
    """An arc (or straight line, curvature 0) with two lanes, a cycle lane and a parking lane on either side.

    `origin` (2,) global position of s = 0 in metres, `heading` rad, `curvature` 1/m (positive: to the left), `lane`
    width of a lane, `walk` width of a sidewalk, `crossing` the s of the cross street, `zebra` the s of a further zebra
    crossing. At most 250 m are used either side of s = 0, so that the arc never closes.
    """

    origin: np.ndarray
    heading: float
    curvature: float
    lane: float
    walk: float
    crossing: float
    zebra: float
    cycle_lane: float = 1.5
    parking: float = 2.9
    cross_half: float = 5.4

    @property
    def kerb(self) -> float:
        """Half the width of the carriageway."""
        return 2 * self.lane + self.cycle_lane + self.parking

    @property
    def front(self) -> float:
        """Distance of the outer edge of the sidewalk from the centre line."""
        return self.kerb + self.walk

    def centre(self, side: int, strip: str | int) -> float:
        """The d of the middle of a strip ("cycle", "parking", "walk" or lane 0, 1) on a side (-1: traffic along +s)."""
        lanes = 2 * self.lane
        middle = {
            0: 0.5 * self.lane,
            1: 1.5 * self.lane,
            "cycle": lanes + self.cycle_lane / 2,
            "parking": lanes + self.cycle_lane + self.parking / 2,
            "walk": self.kerb + self.walk / 2,
        }
        return side * middle[strip]

    def shifted(self, by: np.ndarray) -> "Road":
        """The same road with its origin moved."""
        return replace(self, origin=self.origin + by)

    def direction(self, s: np.ndarray | float) -> np.ndarray:
        """Heading of the centre line in radians."""
        return self.heading + self.curvature * np.asarray(s)

    def to_world(self, s: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Positions (..., 2) in metres of road coordinates."""
        angle, start = self.direction(s), self.heading
        if self.curvature:
            x = (np.sin(angle) - np.sin(start)) / self.curvature
            y = (np.cos(start) - np.cos(angle)) / self.curvature
        else:
            x, y = np.asarray(s) * np.cos(start), np.asarray(s) * np.sin(start)
        return np.stack([x - d * np.sin(angle), y + d * np.cos(angle)], axis=-1) + self.origin

    def to_road(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Road coordinates (s, d) of positions, in the precision of the input."""
        kind = np.result_type(x)
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        dx, dy = x - kind.type(self.origin[0]), y - kind.type(self.origin[1])
        along = dx * kind.type(cos) + dy * kind.type(sin)
        left = dy * kind.type(cos) - dx * kind.type(sin)
        if not self.curvature:
            return along, left
        radius = kind.type(1 / self.curvature)
        sign = kind.type(np.sign(self.curvature))
        across = (radius - left) * sign
        return np.arctan2(along * sign, across) * radius, radius - sign * np.hypot(along, across)


class GroundMap:
    """The ground painted in road coordinates.

    labels (S, D) uint8 of `Ground`; texture: RGB float32 mip levels, each half as fine as the one before; `start` the
    (s, d) of the first cell's corner, `cell` metres a cell.
    """

    cell = 0.1

    def __init__(self, road: Road, span: tuple[float, float], rng: np.random.Generator):
        self.road, self.start = road, (span[0], -EDGE)
        shape = (round((span[1] - span[0]) / self.cell), round(2 * EDGE / self.cell))
        self.labels = np.full(shape, Ground.GRASS, dtype=np.uint8)
        self._paint(span)
        self.texture = self._colour(rng)

    def _fill(self, s: tuple[float, float], d: tuple[float, float], label: Ground) -> None:
        a, b = (round((v - self.start[0]) / self.cell) for v in s)
        c, e = (round((v - self.start[1]) / self.cell) for v in d)
        self.labels[max(a, 0) : max(b, 0), max(c, 0) : max(e, 0)] = label

    def _both(self, s: tuple[float, float], d: tuple[float, float], label: Ground) -> None:
        self._fill(s, d, label)
        self._fill(s, (-d[1], -d[0]), label)

    def _paint(self, span: tuple[float, float]) -> None:
        road = self.road
        edge = 2 * road.lane + road.cycle_lane
        self._both(span, (road.front, SETBACK), Ground.PAVING)
        self._both(span, (road.kerb, road.front), Ground.SIDEWALK)
        self._both(span, (road.kerb, road.kerb + 0.24), Ground.KERB)
        self._both(span, (edge, road.kerb), Ground.PARKING)
        self._fill(span, (-edge, edge), Ground.ASPHALT)
        self._both(span, (0.08, 0.24), Ground.YELLOW)
        for width in (2 * road.lane, edge):
            self._both(span, (width - 0.08, width + 0.08), Ground.WHITE)
        for s in np.arange(span[0], span[1], 9.0):
            self._both((s, s + 3.0), (road.lane - 0.08, road.lane + 0.08), Ground.WHITE)
        for s in np.arange(span[0], span[1], BAY):
            self._both((s, s + 0.12), (edge, road.kerb), Ground.WHITE)
        self._cross_street()
        half = road.cross_half
        for s in (road.crossing - half - 3.2, road.crossing + half + 0.4, road.zebra):
            self._zebra(s)

    def _cross_street(self) -> None:
        s, half = self.road.crossing, self.road.cross_half
        for side in (-1, 1):
            kerb = sorted((s + side * half, s + side * (half + 0.24)))
            walk = sorted((s + side * half, s + side * (half + 3.0)))
            self._both(tuple(walk), (self.road.front, EDGE), Ground.SIDEWALK)
            self._both(tuple(kerb), (self.road.kerb, EDGE), Ground.KERB)
        self._fill((s - half, s + half), (-EDGE, EDGE), Ground.ASPHALT)
        for d in np.arange(self.road.front + 2, EDGE, 6.0):
            self._both((s - 0.08, s + 0.08), (d, d + 3.0), Ground.YELLOW)

    def _zebra(self, s: float) -> None:
        self._fill((s - 0.6, s + 3.4), (-self.road.kerb, self.road.kerb), Ground.ASPHALT)
        for d in np.arange(-self.road.kerb + 0.4, self.road.kerb - 0.4, 1.0):
            self._fill((s, s + 2.8), (d, d + 0.5), Ground.WHITE)

    def _colour(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Colours with coarse stains and fine grain, and their mip levels."""
        rows, columns = self.labels.shape
        coarse = rng.normal(1.0, 0.07, (rows // 40 + 1, columns // 40 + 1)).astype(np.float32)
        coarse = cv2.resize(coarse, (columns, rows), interpolation=cv2.INTER_LINEAR)
        fine = rng.normal(0.0, 0.06, (256, 256)).astype(np.float32)
        coarse += np.tile(fine, (rows // 256 + 1, columns // 256 + 1))[:rows, :columns]
        picture = np.take(COLOURS, self.labels, axis=0)
        picture *= coarse[..., None]
        levels = [picture]
        while len(levels) < 5:
            last = levels[-1]
            levels.append(cv2.resize(last, (last.shape[1] // 2, last.shape[0] // 2), interpolation=cv2.INTER_AREA))
        return levels

    def walk_mask(self, cell: float) -> np.ndarray:
        """Mask (H, W) uint8: 255 on streets and sidewalks, 0 elsewhere, for pixels of `cell` metres.

        The picture begins at the global origin, its lower left corner, and ends where the painted ground does.
        """
        s, d = (np.linspace(a, a + n * self.cell, 60) for a, n in zip(self.start, self.labels.shape, strict=True))
        outline = self.road.to_world(*np.meshgrid(s, d)).reshape(-1, 2) / cell
        (left, low), (right, high) = np.floor(outline.min(axis=0)).astype(int), np.ceil(outline.max(axis=0)).astype(int)
        x, y = (
            np.arange(a, b, dtype=np.float32) * np.float32(cell) + np.float32(cell / 2)
            for a, b in ((left, right), (low, high))
        )
        s, d = self.road.to_road(*np.meshgrid(x, y))
        inside = (
            (s > self.start[0]) & (s < self.start[0] + self.labels.shape[0] * self.cell) & (np.abs(d) < -self.start[1])
        )
        mask = np.zeros((high, right), dtype=np.uint8)
        mask[low:, left:] = 255 * (DRIVABLE_OR_WALK[self.label_at(s, d)] & inside)
        return mask[::-1]

    def label_at(self, s: np.ndarray, d: np.ndarray) -> np.ndarray:
        """The `Ground` at road coordinates; places beyond the painted ground are as its nearest edge."""
        i = ((s - self.start[0]) / self.cell).astype(np.int64).clip(0, self.labels.shape[0] - 1)
        j = ((d - self.start[1]) / self.cell).astype(np.int64).clip(0, self.labels.shape[1] - 1)
        return self.labels[i, j]

    def colour_at(self, s: np.ndarray, d: np.ndarray, level: int) -> np.ndarray:
        """RGB (H, W, 3) at float32 road coordinates (H, W), interpolated in one mip level."""
        scale = np.float32(1 / (self.cell * 2**level))
        column = (d - np.float32(self.start[1])) * scale - np.float32(0.5)
        row = (s - np.float32(self.start[0])) * scale - np.float32(0.5)
        return cv2.remap(self.texture[level], column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
