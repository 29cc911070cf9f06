"""Things of the street that are not annotated: buildings, trees, poles, and clutter that resembles annotated classes.

Bins and bollards are as large as traffic cones, planters as large as barriers, and skips as large as vehicles: the
LiDAR sees similar shapes, a camera sees the difference. Frame and conventions as in `vehicles`.
"""

import numpy as np

from bevfusion.synthetic.geometry import Part, Skin, box, frustum, prism
from bevfusion.synthetic.textures import Tile
from bevfusion.synthetic.vehicles import Size, pick

WALLS = [
    (0.72, 0.66, 0.58),
    (0.58, 0.36, 0.28),
    (0.55, 0.57, 0.60),
    (0.80, 0.78, 0.72),
    (0.45, 0.42, 0.40),
    (0.62, 0.58, 0.42),
]
LEAVES = [(0.20, 0.36, 0.12), (0.28, 0.42, 0.14), (0.16, 0.30, 0.14)]
GREY = Skin(Tile.ROUGH, (0.52, 0.52, 0.50), 0.3)


def building(size: Size, rng: np.random.Generator) -> list[Part]:
    """A block with rows of windows; its front (x) has shops on the ground floor."""
    length, width, height = size
    tile = Tile.OFFICE if rng.random() < 0.5 else Tile.BRICK
    paint = pick(rng, WALLS)
    metres = float(rng.uniform(5.5, 7.0)) if tile == Tile.OFFICE else float(rng.uniform(3.0, 4.0))
    wall, roof = Skin(tile, paint, 0.35, metres), Skin(Tile.ROUGH, (0.35, 0.34, 0.33), 0.2, 4.0)
    shop = Skin(Tile.SHOP, pick(rng, WALLS, 0.15), 0.25, 3.6)
    x, y = length / 2, width / 2
    return [
        box((-x, x), (-y, y), (0.0, 3.6), wall, front=shop),
        box((-x, x - 0.15), (-y, y), (3.6, height), wall, top=roof),
    ]


def tree(size: Size, rng: np.random.Generator) -> list[Part]:
    """A trunk under two stacked crowns."""
    length, _, height = size
    trunk, leaves = Skin(Tile.PLANKS, (0.30, 0.22, 0.15), 0.2, 0.5), Skin(Tile.FOLIAGE, pick(rng, LEAVES), 0.35, 1.2)
    radius, low = length / 2, 0.45 * height
    middle = (low + height) / 2
    return [
        prism((0, 0, low / 2), 0.14, low, trunk, sides=6),
        prism((0, 0, (low + middle) / 2), (0.55 * radius, radius), middle - low, leaves),
        prism((0, 0, (middle + height) / 2), (radius, 0.35 * radius), height - middle, leaves),
    ]


def lamp_post(size: Size, rng: np.random.Generator) -> list[Part]:
    """A tall pole with an arm."""
    length, _, height = size
    pole = Skin(Tile.PLAIN, (0.35, 0.36, 0.37), 0.3)
    light = Skin(Tile.PLAIN, (1.0, 0.9, 0.65), 0.4, glow=True)
    return [
        prism((0, 0, height / 2), 0.09, height, pole, sides=6),
        box((0, length), (-0.08, 0.08), (height - 0.12, height), pole, bottom=light),
    ]


def sign(size: Size, rng: np.random.Generator) -> list[Part]:
    """A traffic sign on a thin pole."""
    _, width, height = size
    face = Skin(Tile.SIGN, (1.0, 1.0, 1.0), 0.95)
    return [
        prism((0, 0, height / 2), 0.05, height, GREY, sides=6),
        box((0.05, 0.08), (-width / 2, width / 2), (height - width, height), face),
    ]


def bin_(size: Size, rng: np.random.Generator) -> list[Part]:
    """A litter bin, green or grey, with a lid."""
    length, width, height = size
    body = Skin(Tile.PLANKS, pick(rng, [(0.10, 0.35, 0.20), (0.30, 0.30, 0.32)]), 0.3)
    x, y = length / 2, width / 2
    low = (-0.8 * x, 0.8 * x, -0.8 * y, 0.8 * y)
    lid = Skin(Tile.PLAIN, (0.1, 0.1, 0.1), 0.2)
    return [
        frustum(low, (-x, x, -y, y), (0.0, 0.88 * height), body),
        box((-x, x), (-y, y), (0.88 * height, height), lid),
    ]


def bollard(size: Size, rng: np.random.Generator) -> list[Part]:
    """A concrete post."""
    length, _, height = size
    return [prism((0, 0, height / 2), (length / 2, 0.38 * length), height, GREY)]


def planter(size: Size, rng: np.random.Generator) -> list[Part]:
    """A concrete trough with a low hedge, as long as a barrier."""
    length, width, height = size
    x, y = length / 2, width / 2
    hedge = Skin(Tile.FOLIAGE, pick(rng, LEAVES), 0.35, 0.8)
    return [
        box((-x, x), (-y, y), (0.0, 0.55 * height), GREY),
        box((-0.8 * x, 0.8 * x), (-0.95 * y, 0.95 * y), (0.55 * height, height), hedge),
    ]


def skip(size: Size, rng: np.random.Generator) -> list[Part]:
    """A rubble skip or site container in a dull colour."""
    length, width, height = size
    steel = Skin(Tile.PLANKS, pick(rng, [(0.16, 0.22, 0.30), (0.30, 0.26, 0.22)]), 0.35)
    x, y = length / 2, width / 2
    return [frustum((-0.85 * x, 0.85 * x, -y, y), (-x, x, -y, y), (0.0, height), steel)]
