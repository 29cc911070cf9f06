"""The texture atlas: small procedural tiles with mip levels, drawn once from a fixed seed.

A tile is a square RGB picture that a skin multiplies by its tint. Tiles for painted or cast surfaces are light grey so
that the tint decides the colour; tiles with an unmistakable look (tyres, glass, hazard stripes) bring their own.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

SIZE = 128
LEVELS = 8

Painter = Callable[[np.ndarray], None]


class Tile(IntEnum):
    """Index of each texture in the atlas."""

    PLAIN = 0
    ROUGH = 1
    FOLIAGE = 2
    GLASS = 3
    WHEEL = 4
    SPOKES = 5
    CAR_SIDE = 6
    CAR_FRONT = 7
    CAR_BACK = 8
    BUS_SIDE = 9
    BUS_FRONT = 10
    TRUCK_BOX = 11
    TRUCK_CAB = 12
    TRAILER_SIDE = 13
    TRAILER_DOOR = 14
    HAZARD = 15
    BOARD = 16
    GRILLE = 17
    TRACK = 18
    CLOTH = 19
    VEST = 20
    FACE = 21
    OFFICE = 22
    BRICK = 23
    SHOP = 24
    PLANKS = 25
    SIGN = 26


class Atlas(NamedTuple):
    """All tiles at all levels in one array.

    texels (3, M) float32: RGB planes, where 1 leaves a tint as it is; start (tiles, LEVELS) int32, the first texel of a
    tile at a level; a level has ``SIZE >> level`` texels a side, stored row by row.
    """

    texels: np.ndarray
    start: np.ndarray


def _rect(tile: np.ndarray, x0: float, y0: float, x1: float, y1: float, colour: tuple[float, float, float]) -> None:
    """Fill a rectangle given in tile fractions (x right, y down)."""
    a, b, c, d = (round(v * SIZE) for v in (x0, x1, y0, y1))
    tile[c:d, a:b] = colour


def _grid(
    tile: np.ndarray, columns: int, rows: int, size: tuple[float, float], colour: tuple[float, float, float]
) -> None:
    """Fill `columns` x `rows` rectangles of `size` (fractions of a cell), each in the middle of its cell."""
    for i in range(columns):
        for j in range(rows):
            x, y = (i + 0.5) / columns, (j + 0.5) / rows
            w, h = size[0] / columns / 2, size[1] / rows / 2
            _rect(tile, x - w, y - h, x + w, y + h, colour)


GLASS = (0.10, 0.14, 0.18)
DARK = (0.06, 0.06, 0.07)


def _glass(tile: np.ndarray) -> None:
    tile[:] = np.linspace(1.5, 0.7, SIZE)[:, None, None] * np.array(GLASS)
    tile[SIZE // 8 : SIZE // 3, SIZE // 6 : SIZE // 2] += 0.07


def _round(tile: np.ndarray, rings: list[tuple[float, tuple[float, float, float]]]) -> None:
    """Paint discs from large to small, radii as fractions of half the tile."""
    for radius, colour in rings:
        cv2.circle(tile, (SIZE // 2, SIZE // 2), round(radius * SIZE / 2), colour, -1)


def _wheel(tile: np.ndarray) -> None:
    tile[:] = DARK
    _round(tile, [(0.62, (0.55, 0.56, 0.58)), (0.5, (0.35, 0.35, 0.37)), (0.2, (0.7, 0.7, 0.72))])


def _spokes(tile: np.ndarray) -> None:
    tile[:] = (0.05, 0.05, 0.05)
    _round(tile, [(0.86, (0.62, 0.63, 0.64))])
    for angle in np.arange(0, 2 * np.pi, np.pi / 6):
        end = (np.array([np.cos(angle), np.sin(angle)]) * 0.42 + 0.5) * SIZE
        cv2.line(tile, (SIZE // 2, SIZE // 2), tuple(int(v) for v in end), (0.2, 0.2, 0.2), 2)
    _round(tile, [(0.15, (0.1, 0.1, 0.1))])


def _car_side(tile: np.ndarray) -> None:
    _rect(tile, 0, 0.8, 1, 1, (0.25, 0.25, 0.25))
    for x in (0.28, 0.5, 0.72):
        _rect(tile, x, 0.0, x + 0.012, 0.8, (0.45, 0.45, 0.45))
    for x in (0.45, 0.67):
        _rect(tile, x, 0.22, x + 0.04, 0.3, (0.35, 0.35, 0.35))


def _car_front(tile: np.ndarray) -> None:
    _rect(tile, 0.22, 0.3, 0.78, 0.62, DARK)
    _rect(tile, 0, 0.78, 1, 1, (0.2, 0.2, 0.2))
    _rect(tile, 0.38, 0.68, 0.62, 0.8, (1.3, 1.3, 1.25))


def _car_back(tile: np.ndarray) -> None:
    _rect(tile, 0, 0.8, 1, 1, (0.2, 0.2, 0.2))
    _rect(tile, 0.36, 0.45, 0.64, 0.6, (1.3, 1.3, 1.25))
    _rect(tile, 0.05, 0.12, 0.95, 0.15, (0.5, 0.5, 0.5))


def _bus_side(tile: np.ndarray) -> None:
    _rect(tile, 0.02, 0.12, 0.98, 0.5, GLASS)
    for x in np.arange(1, 7) / 7:
        _rect(tile, x, 0.12, x + 0.012, 0.5, (0.75, 0.75, 0.75))
    _rect(tile, 0, 0.62, 1, 0.7, (1.6, 1.6, 1.6))
    _rect(tile, 0.8, 0.14, 0.9, 0.92, (0.2, 0.24, 0.28))
    _rect(tile, 0, 0.94, 1, 1, (0.2, 0.2, 0.2))


def _bus_front(tile: np.ndarray) -> None:
    _rect(tile, 0.2, 0.03, 0.8, 0.12, (1.5, 1.0, 0.25))
    _rect(tile, 0.05, 0.16, 0.95, 0.62, GLASS)
    _rect(tile, 0.08, 0.78, 0.25, 0.86, (1.6, 1.6, 1.4))
    _rect(tile, 0.75, 0.78, 0.92, 0.86, (1.6, 1.6, 1.4))
    _rect(tile, 0, 0.92, 1, 1, (0.2, 0.2, 0.2))


def _truck_box(tile: np.ndarray) -> None:
    _rect(tile, 0, 0, 1, 0.04, (0.6, 0.6, 0.6))
    _rect(tile, 0, 0.94, 1, 1, (0.35, 0.35, 0.35))
    _rect(tile, 0.25, 0.3, 0.75, 0.62, (0.35, 0.45, 0.75))
    _rect(tile, 0.3, 0.4, 0.7, 0.52, (1.0, 1.0, 1.0))


def _truck_cab(tile: np.ndarray) -> None:
    _rect(tile, 0.06, 0.1, 0.94, 0.45, GLASS)
    _rect(tile, 0.2, 0.58, 0.8, 0.82, (0.12, 0.12, 0.13))
    _rect(tile, 0.02, 0.84, 0.18, 0.93, (1.6, 1.6, 1.4))
    _rect(tile, 0.82, 0.84, 0.98, 0.93, (1.6, 1.6, 1.4))


def _trailer_side(tile: np.ndarray) -> None:
    for x in np.arange(0, 24) / 24:
        _rect(tile, x, 0, x + 0.018, 0.9, (0.55, 0.55, 0.57))
    for i in range(10):
        _rect(tile, i / 10, 0.9, i / 10 + 0.05, 1, (1.0, 0.1, 0.08))


def _trailer_door(tile: np.ndarray) -> None:
    _rect(tile, 0.485, 0, 0.515, 0.9, (0.2, 0.2, 0.2))
    for x in (0.2, 0.35, 0.65, 0.8):
        _rect(tile, x, 0.05, x + 0.025, 0.85, (0.5, 0.5, 0.5))
    for i in range(5):
        _rect(tile, i / 5, 0.9, i / 5 + 0.1, 1, (1.0, 0.1, 0.08))


def _stripes(tile: np.ndarray, other: tuple[float, float, float], count: int) -> None:
    """Diagonal stripes, every second one in `other`."""
    y, x = np.mgrid[:SIZE, :SIZE]
    tile[((x + y) * count // SIZE) % 2 == 1] = other


def _board(tile: np.ndarray) -> None:
    tile[:] = (1.0, 1.0, 1.0)
    _stripes(tile, (1.0, 0.32, 0.04), 8)


def _hazard(tile: np.ndarray) -> None:
    tile[:] = (1.0, 0.75, 0.05)
    _stripes(tile, (0.05, 0.05, 0.05), 6)


def _grille(tile: np.ndarray) -> None:
    tile[:] = (0.15, 0.15, 0.16)
    _grid(tile, 1, 8, (1.0, 0.4), (0.4, 0.4, 0.42))


def _track(tile: np.ndarray) -> None:
    tile[:] = (0.12, 0.11, 0.10)
    _grid(tile, 12, 1, (0.4, 1.0), (0.26, 0.24, 0.22))


def _cloth(tile: np.ndarray) -> None:
    tile[::16] *= 0.8
    tile[1::16] *= 0.8
    _rect(tile, 0.46, 0, 0.54, 1, (0.7, 0.7, 0.7))


def _vest(tile: np.ndarray) -> None:
    tile[:] = (1.0, 0.45, 0.05)
    for y in (0.35, 0.7):
        _rect(tile, 0, y, 1, y + 0.1, (1.0, 1.0, 0.75))


def _face(tile: np.ndarray) -> None:
    _rect(tile, 0, 0, 1, 0.35, (0.2, 0.15, 0.12))
    _rect(tile, 0.3, 0.5, 0.4, 0.56, (0.1, 0.1, 0.1))
    _rect(tile, 0.6, 0.5, 0.7, 0.56, (0.1, 0.1, 0.1))


def _office(tile: np.ndarray) -> None:
    _grid(tile, 4, 2, (0.62, 0.6), GLASS)
    _grid(tile, 4, 2, (0.05, 0.6), (0.6, 0.6, 0.6))


def _brick(tile: np.ndarray) -> None:
    for j in range(16):
        _rect(tile, 0, j / 16, 1, j / 16 + 0.01, (0.75, 0.75, 0.75))
        for i in range(6):
            x = (i + 0.5 * (j % 2)) / 6
            _rect(tile, x, j / 16, x + 0.01, (j + 1) / 16, (0.75, 0.75, 0.75))
    _grid(tile, 2, 1, (0.4, 0.5), (0.9, 0.9, 0.85))
    _grid(tile, 2, 1, (0.34, 0.44), GLASS)


def _shop(tile: np.ndarray) -> None:
    _rect(tile, 0, 0.04, 1, 0.24, (1.4, 0.5, 0.4))
    _rect(tile, 0.05, 0.3, 0.62, 0.92, (0.22, 0.26, 0.27))
    _rect(tile, 0.7, 0.3, 0.92, 1.0, (0.3, 0.2, 0.15))


def _planks(tile: np.ndarray) -> None:
    for j in range(5):
        _rect(tile, 0, j / 5, 1, j / 5 + 0.03, (0.45, 0.45, 0.45))


def _sign(tile: np.ndarray) -> None:
    tile[:] = (0.9, 0.9, 0.9)
    _rect(tile, 0.08, 0.08, 0.92, 0.92, (0.1, 0.25, 0.7))
    _rect(tile, 0.42, 0.2, 0.58, 0.8, (1.0, 1.0, 1.0))


_PAINTERS: dict[Tile, tuple[Painter | None, float]] = {  # how a tile is painted, and how strong its grain is
    Tile.PLAIN: (None, 0.02),
    Tile.ROUGH: (None, 0.10),
    Tile.FOLIAGE: (None, 0.38),
    Tile.GLASS: (_glass, 0.03),
    Tile.WHEEL: (_wheel, 0.05),
    Tile.SPOKES: (_spokes, 0.02),
    Tile.CAR_SIDE: (_car_side, 0.02),
    Tile.CAR_FRONT: (_car_front, 0.02),
    Tile.CAR_BACK: (_car_back, 0.02),
    Tile.BUS_SIDE: (_bus_side, 0.02),
    Tile.BUS_FRONT: (_bus_front, 0.02),
    Tile.TRUCK_BOX: (_truck_box, 0.03),
    Tile.TRUCK_CAB: (_truck_cab, 0.02),
    Tile.TRAILER_SIDE: (_trailer_side, 0.04),
    Tile.TRAILER_DOOR: (_trailer_door, 0.04),
    Tile.HAZARD: (_hazard, 0.05),
    Tile.BOARD: (_board, 0.03),
    Tile.GRILLE: (_grille, 0.03),
    Tile.TRACK: (_track, 0.08),
    Tile.CLOTH: (_cloth, 0.08),
    Tile.VEST: (_vest, 0.05),
    Tile.FACE: (_face, 0.03),
    Tile.OFFICE: (_office, 0.04),
    Tile.BRICK: (_brick, 0.08),
    Tile.SHOP: (_shop, 0.05),
    Tile.PLANKS: (_planks, 0.10),
    Tile.SIGN: (_sign, 0.02),
}


@lru_cache(maxsize=1)
def atlas() -> Atlas:
    """Paint all tiles and their mip levels."""
    rng = np.random.default_rng(0)
    texels, start, total = [], np.zeros((len(Tile), LEVELS), dtype=np.int32), 0
    for tile in Tile:
        painter, grain = _PAINTERS[tile]
        picture = np.ones((SIZE, SIZE, 3), dtype=np.float32)
        if painter:
            painter(picture)
        noise = cv2.GaussianBlur(rng.standard_normal((SIZE, SIZE)), (0, 0), 1.0) * 3
        picture = (picture * (1 + grain * noise[..., None])).clip(0, 2).astype(np.float32)
        for level in range(LEVELS):
            start[tile, level] = total
            size = SIZE >> level
            texels.append(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA).reshape(-1, 3))
            total += size * size
    return Atlas(np.ascontiguousarray(np.concatenate(texels).T), start)
