"""Shapes of pedestrians, cycles, traffic cones and barriers; frame and conventions as in `vehicles`."""

import numpy as np

from bevfusion.synthetic.geometry import Part, Skin, beam, box, frustum, prism
from bevfusion.synthetic.textures import Tile
from bevfusion.synthetic.vehicles import TAIL_LIGHT, Size, pick

SHIRTS = [
    (0.75, 0.15, 0.15), (0.15, 0.25, 0.65), (0.90, 0.90, 0.88), (0.15, 0.45, 0.25), (0.20, 0.20, 0.22),
    (0.85, 0.65, 0.20), (0.45, 0.20, 0.45),
]  # fmt: skip
TROUSERS = [(0.12, 0.15, 0.28), (0.10, 0.10, 0.10), (0.40, 0.33, 0.24), (0.30, 0.32, 0.35)]
SKINS = [(0.87, 0.68, 0.56), (0.62, 0.44, 0.33), (0.38, 0.26, 0.20)]
CYCLE_PAINTS = [(0.75, 0.10, 0.10), (0.10, 0.30, 0.70), (0.10, 0.10, 0.10), (0.15, 0.55, 0.30)]
ORANGE = (1.0, 0.36, 0.05)
WHITE = (0.95, 0.95, 0.95)
SPOKES = Skin(Tile.SPOKES, (1.0, 1.0, 1.0), 0.2)
RUBBER = Skin(Tile.PLAIN, (0.05, 0.05, 0.05), 0.05)
METAL = Skin(Tile.PLAIN, (0.45, 0.46, 0.48), 0.4)


def pedestrian(size: Size, rng: np.random.Generator, *, worker: bool = False) -> list[Part]:
    """A walking or standing person: two legs apart, torso, arms, head; workers wear a vest and a helmet."""
    length, width, height = size
    shirt = Skin(Tile.VEST, (1.0, 1.0, 1.0), 0.8) if worker else Skin(Tile.CLOTH, pick(rng, SHIRTS), 0.3)
    legs, skin = Skin(Tile.CLOTH, pick(rng, TROUSERS), 0.2), pick(rng, SKINS)
    x, y = length / 2, width / 2
    hip, neck = 0.48 * height, 0.83 * height
    head = Skin(Tile.FACE, skin, 0.3)
    top = Skin(Tile.PLAIN, (0.98, 0.80, 0.05), 0.5) if worker else Skin(Tile.PLAIN, (0.16, 0.11, 0.08), 0.2)
    parts = [
        frustum((x - 0.24, x, 0.02, 0.16), (-0.02, 0.16, 0.01, 0.17), (0.0, hip), legs),
        frustum((-x, 0.24 - x, -0.16, -0.02), (-0.16, 0.02, -0.17, -0.01), (0.0, hip), legs),
        frustum((-0.13, 0.13, -0.2, 0.2), (-0.15, 0.15, -0.24, 0.24), (hip, neck), shirt),
        box((-0.11, 0.11), (-0.1, 0.1), (neck, 0.96 * height), head),
        prism((0, 0, 0.96 * height), 0.13, 0.08 * height, top, sides=6),
    ]
    swing = min(x - 0.06, 0.3)
    for side in (1, -1):
        hand = sorted((side * (y - 0.1), side * y))
        shoulder = sorted((side * 0.22, side * min(y, 0.32)))
        reach = (-side * swing - 0.06, -side * swing + 0.06)
        parts.append(frustum((*reach, *hand), (-0.07, 0.07, *shoulder), (0.46 * height, 0.8 * height), shirt))
    return parts


def _rider(
    seat: tuple[float, float], height: float, width: float, helmet: bool, rng: np.random.Generator
) -> list[Part]:
    """A person on a cycle whose seat is at (x, z), leaning forward, reaching up to `height`."""
    x, z = seat
    shirt, legs = Skin(Tile.CLOTH, pick(rng, SHIRTS), 0.3), Skin(Tile.CLOTH, pick(rng, TROUSERS), 0.2)
    cap = Skin(Tile.PLAIN, pick(rng, [(0.9, 0.9, 0.9), (0.1, 0.1, 0.1), (0.8, 0.1, 0.1)]), 0.4)
    head = cap if helmet else Skin(Tile.FACE, pick(rng, SKINS), 0.3)
    neck = height - 0.27
    y = min(width / 2, 0.26)
    parts = [
        frustum((x - 0.14, x + 0.12, -0.18, 0.18), (x + 0.1, x + 0.34, -y, y), (z, neck), shirt),
        box((x + 0.12, x + 0.34), (-0.11, 0.11), (neck, height), head),
        beam((x + 0.26, neck - 0.12), (x + 0.68, neck - 0.35), (-y, -y + 0.1), 0.09, shirt),
        beam((x + 0.26, neck - 0.12), (x + 0.68, neck - 0.35), (y - 0.1, y), 0.09, shirt),
    ]
    for side in (0.08, -0.2):
        parts.append(beam((x, z), (x + 0.36, z - 0.12), (side, side + 0.12), 0.15, legs))
        parts.append(beam((x + 0.36, z - 0.08), (x + 0.2, 0.26), (side, side + 0.12), 0.13, legs))
    return parts


def bicycle(size: Size, rng: np.random.Generator, *, rider: bool) -> list[Part]:
    """Two thin spoked wheels, a diamond of bars, saddle and handlebar, and perhaps a rider."""
    length, width, height = size
    paint = Skin(Tile.PLAIN, pick(rng, CYCLE_PAINTS), 0.35)
    radius = 0.34
    flat = radius / np.cos(np.pi / 10)
    hub = length / 2 - flat
    bar, saddle = (1.05, 0.95) if rider else (height - 0.03, 0.88 * height)
    front, rear, pedals = (hub, radius), (-hub, radius), (-0.1, radius - 0.03)
    seat = (-0.22, saddle)
    parts = [
        *(prism((x, 0, radius), flat, 0.05, RUBBER, axis="y", sides=10, cap=SPOKES) for x in (hub, -hub)),
        beam(rear, seat, (-0.03, 0.03), 0.05, paint),
        beam(rear, pedals, (-0.03, 0.03), 0.05, paint),
        beam(pedals, seat, (-0.03, 0.03), 0.05, paint),
        beam(pedals, (hub - 0.2, bar - 0.2), (-0.03, 0.03), 0.06, paint),
        beam((hub - 0.22, bar), front, (-0.03, 0.03), 0.06, paint),
        box((hub - 0.27, hub - 0.2), (-width / 2, width / 2), (bar - 0.03, bar + 0.03), METAL),
        box((-0.36, -0.08), (-0.09, 0.09), (saddle - 0.05, saddle), RUBBER),
    ]
    return parts + (_rider(seat, height, width, False, rng) if rider else [])


def motorcycle(size: Size, rng: np.random.Generator, *, rider: bool) -> list[Part]:
    """Two fat wheels, engine, painted tank and fairing, seat, and perhaps a rider with a helmet."""
    length, width, height = size
    paint = Skin(Tile.PLAIN, pick(rng, CYCLE_PAINTS), 0.4)
    radius = 0.32
    flat = radius / np.cos(np.pi / 8)
    hub = length / 2 - radius
    bar = 1.08 if rider else height - 0.04
    engine = Skin(Tile.GRILLE, (1.0, 1.0, 1.0), 0.3)
    hub_cap = Skin(Tile.WHEEL, (1.0, 1.0, 1.0), 0.2)
    parts = [
        *(prism((x, 0, radius), flat, 0.17, RUBBER, axis="y", cap=hub_cap) for x in (hub, -hub)),
        box((-0.3, 0.35), (-0.19, 0.19), (0.24, 0.62), engine),
        frustum((-0.05, 0.5, -0.2, 0.2), (0.0, 0.42, -0.14, 0.14), (0.62, 0.9), paint),
        frustum((-hub - 0.15, -0.05, -0.17, 0.17), (-hub - 0.2, -0.05, -0.15, 0.15), (0.62, 0.8), RUBBER),
        beam((hub - 0.3, bar - 0.05), (hub, radius), (-0.12, 0.12), 0.1, METAL),
        frustum((hub - 0.36, hub - 0.05, -0.2, 0.2), (hub - 0.36, hub - 0.22, -0.14, 0.14), (0.72, bar + 0.04), paint),
        box((hub - 0.4, hub - 0.33), (-width / 2, width / 2), (bar - 0.08, bar), METAL),
        box((-hub - 0.22, -hub - 0.18), (-0.1, 0.1), (0.64, 0.76), TAIL_LIGHT),
    ]
    return parts + (_rider((-0.3, 0.8), height, width, True, rng) if rider else [])


def traffic_cone(size: Size, rng: np.random.Generator) -> list[Part]:
    """An orange cone with two white bands on a square foot."""
    length, width, height = size
    orange = Skin(Tile.PLAIN, pick(rng, [ORANGE]), 0.45)
    white = Skin(Tile.PLAIN, WHITE, 0.95)
    foot = 0.06
    levels = [foot, 0.3 * height, 0.47 * height, 0.63 * height, 0.8 * height, height]
    radii = np.interp(levels, [foot, height], [0.42 * length, 0.07 * length])
    parts = [box((-length / 2, length / 2), (-width / 2, width / 2), (0.0, foot), orange)]
    for i in range(5):
        skin = (orange, white)[i % 2]
        middle = (levels[i] + levels[i + 1]) / 2
        parts.append(prism((0, 0, middle), (radii[i], radii[i + 1]), levels[i + 1] - levels[i], skin))
    return parts


def barrier(size: Size, rng: np.random.Generator) -> list[Part]:
    """A striped board on feet, or a plastic wall element; long across (y), thin along (x)."""
    length, width, height = size
    x, y = length / 2, width / 2
    if rng.random() < 0.5:
        board, foot = Skin(Tile.BOARD, (1.0, 1.0, 1.0), 0.8, 0.9), Skin(Tile.PLAIN, (0.3, 0.3, 0.3), 0.2)
        posts = ((y - 0.35, y - 0.2), (0.2 - y, 0.35 - y))
        parts = [
            box((-0.06, 0.06), (-y, y), span, board)
            for span in ((0.55 * height, height), (0.15 * height, 0.42 * height))
        ]
        parts += [box((-x, x), post, (0.0, 0.08), foot) for post in posts]
        return parts + [box((-0.04, 0.04), post, (0.08, 0.9 * height), foot) for post in posts]
    skin = Skin(Tile.ROUGH, pick(rng, [ORANGE, (0.9, 0.12, 0.1)]), 0.45)
    band = Skin(Tile.ROUGH, WHITE, 0.7)
    return [
        frustum((-x, x, -y, y), (-0.6 * x, 0.6 * x, -y, y), (0.0, 0.4 * height), skin),
        box((-0.5 * x, 0.5 * x), (-y, y), (0.4 * height, 0.65 * height), band),
        box((-0.5 * x, 0.5 * x), (-y + 0.04, y - 0.04), (0.65 * height, height), skin),
    ]
