"""Shapes of cars, trucks, buses, trailers and construction vehicles.

Every function takes the size (length, width, height) in metres and a random generator, and returns the parts in the
object's frame: origin on the ground under the middle, x forward, y left, z up. The parts together touch all six sides
of the size, so that the annotated box is tight.
"""

import numpy as np

from bevfusion.synthetic.geometry import Part, Skin, beam, box, frustum, prism
from bevfusion.synthetic.textures import Tile

Size = tuple[float, float, float]
Rgb = tuple[float, float, float]

GLASS = Skin(Tile.GLASS, (1.0, 1.0, 1.0), 0.06)
TYRE = Skin(Tile.PLAIN, (0.05, 0.05, 0.05), 0.05)
HUB = Skin(Tile.WHEEL, (1.0, 1.0, 1.0), 0.15)
CHASSIS = Skin(Tile.PLAIN, (0.09, 0.09, 0.10), 0.08)
HEADLIGHT = Skin(Tile.PLAIN, (1.0, 0.97, 0.85), 0.7, glow=True)
TAIL_LIGHT = Skin(Tile.PLAIN, (0.95, 0.07, 0.05), 0.9, glow=True)

CAR_PAINTS = [
    (0.82, 0.83, 0.84), (0.55, 0.57, 0.60), (0.10, 0.10, 0.11), (0.62, 0.08, 0.08), (0.10, 0.20, 0.50),
    (0.28, 0.31, 0.34), (0.14, 0.32, 0.22), (0.60, 0.55, 0.45),
]  # fmt: skip
CAB_PAINTS = [(0.85, 0.85, 0.85), (0.70, 0.12, 0.10), (0.12, 0.25, 0.60), (0.15, 0.45, 0.30)]
BOX_PAINTS = [(0.90, 0.90, 0.88), (0.80, 0.78, 0.70), (0.75, 0.80, 0.85)]
BUS_PAINTS = [(0.10, 0.55, 0.25), (0.85, 0.20, 0.45), (0.45, 0.20, 0.60), (0.05, 0.50, 0.60)]
TRAILER_PAINTS = [(0.62, 0.64, 0.67), (0.50, 0.36, 0.26), (0.36, 0.44, 0.54)]
MACHINE_PAINTS = [(0.95, 0.68, 0.05), (0.92, 0.58, 0.05)]


def pick(rng: np.random.Generator, choices: list[Rgb], spread: float = 0.04) -> Rgb:
    """One of the colours, varied a little."""
    colour = np.array(choices[rng.integers(len(choices))]) + rng.uniform(-spread, spread, 3)
    return tuple(float(c) for c in colour.clip(0.02, 1.0))


def painted(tile: Tile, paint: Rgb) -> Skin:
    """Car paint: the lighter, the more of the laser it reflects."""
    return Skin(tile, paint, 0.10 + 0.4 * sum(paint) / 3)


def wheels(xs: list[float], width: float, radius: float, thick: float) -> list[Part]:
    """A wheel at each x on either side, flush with `width` and standing on the ground."""
    # The lowest and highest points of an octagon with flat sides up and down lie at radius * cos(pi / 8).
    flat = radius / np.cos(np.pi / 8)
    ys = (width / 2 - thick / 2, -width / 2 + thick / 2)
    return [prism((x, y, radius), flat, thick, TYRE, axis="y", cap=HUB) for x in xs for y in ys]


def lamps(x: float, outward: float, width: float, z: tuple[float, float], skin: Skin) -> list[Part]:
    """A pair of lamps on the face at `x`, standing out by 2 cm in the direction `outward` (+1 or -1)."""
    span = tuple(sorted((x, x + 0.02 * outward)))
    half = width / 2
    return [box(span, y, z, skin) for y in ((half - 0.42, half - 0.1), (0.1 - half, 0.42 - half))]


def car(size: Size, rng: np.random.Generator) -> list[Part]:
    """A saloon, hatchback or SUV: a painted body, a glass cabin with a painted roof, four wheels, lamps."""
    length, width, height = size
    paint = pick(rng, CAR_PAINTS)
    body, side = painted(Tile.PLAIN, paint), painted(Tile.CAR_SIDE, paint)
    front, back = painted(Tile.CAR_FRONT, paint), painted(Tile.CAR_BACK, paint)
    half, y, waist = length / 2 - 0.02, width / 2 - 0.02, 0.56 * height
    tail = rng.choice([0.40, 0.47, 0.49])
    cabin = (-tail * length, 0.24 * length, -y + 0.04, y - 0.04)
    roof = (-(tail - 0.07) * length, 0.06 * length, -y + 0.20, y - 0.20)
    parts = [
        box((-half, half), (-y, y), (0.22, waist), body, sides=side, front=front, back=back),
        frustum(cabin, roof, (waist, height), GLASS, top=body),
    ]
    parts += wheels([0.31 * length, -0.31 * length], width, 0.33, 0.22)
    parts += lamps(half, 1, width, (0.62 * waist, 0.82 * waist), HEADLIGHT)
    return parts + lamps(-half, -1, width, (0.68 * waist, 0.9 * waist), TAIL_LIGHT)


def truck(size: Size, rng: np.random.Generator) -> list[Part]:
    """A cab in a strong colour in front of a light box body."""
    length, width, height = size
    paint = pick(rng, CAB_PAINTS)
    cab = painted(Tile.PLAIN, paint)
    cargo = Skin(Tile.TRUCK_BOX, pick(rng, BOX_PAINTS), 0.45)
    half, y = length / 2 - 0.02, width / 2 - 0.02
    split = half - min(0.28 * length, 2.1)
    low, top = (split, half, -y + 0.06, y - 0.06), 0.80 * height
    parts = [
        box(
            (split, half),
            (-y + 0.06, y - 0.06),
            (0.45, 0.45 + 0.5 * (top - 0.45)),
            cab,
            front=painted(Tile.GRILLE, paint),
        ),
        frustum(
            low, (split, half - 0.25, -y + 0.1, y - 0.1), (0.45 + 0.5 * (top - 0.45), top), GLASS, top=cab, back=cab
        ),
        box((-length / 2, split - 0.12), (-width / 2, width / 2), (0.95, height), cargo, top=cab),
        box((-half, split), (-0.45, 0.45), (0.55, 0.95), CHASSIS),
    ]
    parts += wheels([half - 0.9, -0.25 * length, -0.25 * length - 1.05], width - 0.04, 0.45, 0.28)
    return parts + lamps(half, 1, width, (0.6, 0.8), HEADLIGHT) + lamps(-half, -1, width, (0.7, 0.9), TAIL_LIGHT)


def bus(size: Size, rng: np.random.Generator) -> list[Part]:
    """One long coloured body with a band of windows."""
    length, width, height = size
    paint = pick(rng, BUS_PAINTS)
    side, front = Skin(Tile.BUS_SIDE, paint, 0.4), Skin(Tile.BUS_FRONT, paint, 0.4)
    roof = Skin(Tile.PLAIN, (0.85, 0.85, 0.85), 0.4)
    half, y = length / 2 - 0.02, width / 2 - 0.01
    parts = [
        box((-half, half), (-y, y), (0.32, height - 0.2), side, ends=front, top=roof),
        box((-0.3 * length, 0.2 * length), (-0.6, 0.6), (height - 0.2, height), roof),
    ]
    parts += wheels([0.32 * length, -0.28 * length], width, 0.5, 0.3)
    return parts + lamps(half, 1, width, (0.7, 0.9), HEADLIGHT) + lamps(-half, -1, width, (0.9, 1.3), TAIL_LIGHT)


def trailer(size: Size, rng: np.random.Generator) -> list[Part]:
    """A ribbed box on rear axles, nothing but landing legs in front."""
    length, width, height = size
    paint = pick(rng, TRAILER_PAINTS)
    side, door = Skin(Tile.TRAILER_SIDE, paint, 0.5), Skin(Tile.TRAILER_DOOR, paint, 0.5)
    half, y = length / 2, width / 2
    axles = [-half + 1.0, -half + 2.3, -half + 3.6]
    parts = [
        box((-half, half), (-y, y), (1.05, height), side, ends=door, top=Skin(Tile.PLAIN, paint, 0.5)),
        box((-half + 0.3, half - 0.5), (-0.5, 0.5), (0.75, 1.05), CHASSIS),
    ]
    parts += [box((0.28 * length, 0.28 * length + 0.2), s, (0.0, 1.05), CHASSIS) for s in ((0.7, 0.9), (-0.9, -0.7))]
    return parts + wheels(axles, width - 0.06, 0.48, 0.32)


def excavator(size: Size, rng: np.random.Generator) -> list[Part]:
    """Two tracks, a turning platform with a cab, and a boom with a bucket reaching forward."""
    length, width, height = size
    paint = pick(rng, MACHINE_PAINTS)
    steel, track = Skin(Tile.PLAIN, paint, 0.4), Skin(Tile.TRACK, (1.0, 1.0, 1.0), 0.1)
    half, y = length / 2, width / 2
    rear = 0.08 * length
    shovel = Skin(Tile.ROUGH, (0.22, 0.21, 0.2), 0.15)
    elbow, tip = (0.29 * length, height - 0.25), (half - 0.42, 0.85)
    return [
        *(box((-half + 0.1, rear + 0.6), s, (0.0, 0.75), track) for s in ((y - 0.6, y), (-y, -y + 0.6))),
        box(
            (-half, rear), (-y + 0.15, y - 0.15), (0.8, 1.75), steel, sides=Skin(Tile.HAZARD, (1.0, 1.0, 1.0), 0.4, 1.0)
        ),
        frustum((-0.2, rear + 0.7, 0.1, y - 0.2), (-0.2, rear + 0.4, 0.1, y - 0.25), (0.8, height), GLASS, top=steel),
        beam((rear, 1.5), elbow, (-0.55, -0.15), 0.28, steel),
        beam(elbow, tip, (-0.5, -0.2), 0.26, steel),
        frustum((half - 0.7, half, -0.85, 0.15), (half - 0.6, half - 0.2, -0.7, 0.0), (0.05, 0.9), shovel),
    ]


def wheel_loader(size: Size, rng: np.random.Generator) -> list[Part]:
    """Four big wheels, an engine block, a cab in the middle and a wide shovel in front."""
    length, width, height = size
    paint = pick(rng, MACHINE_PAINTS)
    steel = Skin(Tile.PLAIN, paint, 0.4)
    shovel = Skin(Tile.ROUGH, (0.25, 0.23, 0.2), 0.15)
    half, y = length / 2, width / 2
    hazard = Skin(Tile.HAZARD, (1.0, 1.0, 1.0), 0.4, 1.0)
    return [
        box((-half, -0.02 * length), (-0.75, 0.75), (0.8, 0.6 * height), steel, back=hazard, sides=steel),
        frustum((-0.14 * length, 0.12 * length, -0.7, 0.7), (-0.12 * length, 0.08 * length, -0.62, 0.62),
                (0.6 * height, height), GLASS, top=steel),
        box((-0.02 * length, 0.26 * length), (-0.6, 0.6), (0.7, 0.48 * height), steel),
        beam((0.08 * length, 0.45 * height), (half - 0.6, 0.6), (-0.5, 0.5), 0.3, steel),
        frustum((half - 0.9, half, -y, y), (half - 0.9, half - 0.5, -y, y), (0.08, 1.05), shovel),
        *wheels([0.2 * length, -0.26 * length], width - 0.15, 0.72, 0.5),
    ]  # fmt: skip


def construction_vehicle(size: Size, rng: np.random.Generator) -> list[Part]:
    """An excavator or a wheel loader."""
    return (excavator if rng.random() < 0.55 else wheel_loader)(size, rng)
