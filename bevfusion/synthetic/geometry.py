"""Convex solids: the one shape that the LiDAR and the cameras of the synthetic world both see.

A solid is the intersection of half-spaces ``normal . x <= offset``. Along a ray ``origin + t * direction`` seen from
outside, the planes that the origin lies in front of bound the entry and the others the exit, and the inverse
``1 / t = normal . direction / (offset - normal . origin)`` is linear in the direction. Both sensors therefore test rays
against solids with the same few multiplications, and agree on where a surface is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass(frozen=True)
class Skin:
    """How a face looks to a camera and to the LiDAR.

    `tile` is an index into the texture atlas, `tint` the RGB factor in [0, 1], `reflect` the LiDAR reflectivity in
    [0, 1], `metres` the edge length of one texture tile (None stretches one tile over the face), `glow` a surface
    that shines by itself.
    """

    tile: int
    tint: tuple[float, float, float]
    reflect: float
    metres: float | None = None
    glow: bool = False


@dataclass(frozen=True)
class Part:
    """One convex solid: vertices (V, 3) in metres, and for each face its vertex indices in order and its skin."""

    vertices: np.ndarray
    faces: Sequence[Sequence[int]]
    skins: Sequence[Skin]


def frustum(
    low: tuple[float, float, float, float],
    high: tuple[float, float, float, float],
    z: tuple[float, float],
    skin: Skin,
    **faces: Skin,
) -> Part:
    """A solid between two horizontal rectangles (x0, x1, y0, y1), the `low` one at z[0] and the `high` one at z[1].

    `skin` covers it all but for the faces named among front, back, left, right, top, bottom; `sides` stands for left
    and right, `ends` for front and back.
    """
    corners = [(x0, y0, h) for (a, b, c, d), h in ((low, z[0]), (high, z[1])) for x0 in (a, b) for y0 in (c, d)]
    outline = {
        "front": (2, 3, 7, 6),
        "back": (1, 0, 4, 5),
        "left": (3, 1, 5, 7),
        "right": (0, 2, 6, 4),
        "top": (4, 6, 7, 5),
        "bottom": (0, 1, 3, 2),
    }
    group = {"front": "ends", "back": "ends", "left": "sides", "right": "sides", "top": "", "bottom": ""}
    skins = [faces.get(name, faces.get(group[name], skin)) for name in outline]
    return Part(np.array(corners, dtype=np.float64), list(outline.values()), skins)


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], skin: Skin, **faces: Skin) -> Part:
    """An axis-aligned cuboid; faces as in `frustum`."""
    return frustum((*x, *y), (*x, *y), z, skin, **faces)


def prism(
    centre: tuple[float, float, float],
    radius: float | tuple[float, float],
    length: float,
    skin: Skin,
    *,
    axis: str = "z",
    sides: int = 8,
    cap: Skin | None = None,
) -> Part:
    """A regular prism (or, with two radii, a truncated pyramid) around the `axis` "y" or "z", centred at `centre`."""
    first, last = radius if isinstance(radius, tuple) else (radius, radius)
    angle = (np.arange(sides) + 0.5) * (2 * np.pi / sides)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if axis == "y":
        ring = ring[:, ::-1]
    ends = [
        np.insert(ring * r, 1 if axis == "y" else 2, h, axis=1) for r, h in ((first, -length / 2), (last, length / 2))
    ]
    walls = [(i, (i + 1) % sides, sides + (i + 1) % sides, sides + i) for i in range(sides)]
    caps = [tuple(range(sides))[::-1], tuple(range(sides, 2 * sides))]
    return Part(np.concatenate(ends) + np.array(centre), walls + caps, [skin] * sides + [cap or skin] * 2)


def beam(
    start: tuple[float, float], end: tuple[float, float], y: tuple[float, float], thick: float, skin: Skin
) -> Part:
    """A bar of height `thick` from `start` to `end`, two points (x, z), as wide as `y`."""
    a, b = np.array(start), np.array(end)
    along = (b - a) / np.linalg.norm(b - a)
    up = np.array([-along[1], along[0]]) * thick / 2
    corners = [(p[0], w, p[1]) for side in (-up, up) for p in (a + side, b + side) for w in y]
    faces = [(2, 3, 7, 6), (1, 0, 4, 5), (3, 1, 5, 7), (0, 2, 6, 4), (4, 6, 7, 5), (0, 1, 3, 2)]
    return Part(np.array(corners, dtype=np.float64), faces, [skin] * 6)


@dataclass(frozen=True)
class Solids:
    """N solids, padded to K faces and V vertices by repeating the first.

    normals (N, K, 3) unit, outward; offsets (N, K) m; vertices (N, V, 3) m; texture (N, K, 2, 4): the tile coordinates
    (s, t) of a point p are ``texture[..., :3] . p + texture[..., 3]``; density (N, K) tiles per metre; tile (N, K) int;
    tint (N, K, 3); reflect (N, K); glow (N, K) bool; radius (N,) m, of a sphere around the vertices; n_faces (N,) int,
    the faces that are not padding; owner (N,) int, the object that a solid belongs to.
    """

    normals: np.ndarray
    offsets: np.ndarray
    vertices: np.ndarray
    texture: np.ndarray
    density: np.ndarray
    tile: np.ndarray
    tint: np.ndarray
    reflect: np.ndarray
    glow: np.ndarray
    radius: np.ndarray
    n_faces: np.ndarray
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: np.ndarray) -> "Solids":
        return Solids(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def placed(self, xyz: np.ndarray, yaw: np.ndarray) -> "Solids":
        """Move every solid by its own pose: a turn by `yaw` (N,) about the vertical, then a shift by `xyz` (N, 3)."""
        cos, sin = np.cos(yaw), np.sin(yaw)
        normals = _turn(self.normals, cos[:, None], sin[:, None])
        axes = _turn(self.texture[..., :3], cos[:, None, None], sin[:, None, None])
        shift = self.texture[..., 3] - (axes * xyz[:, None, None, :]).sum(-1)
        return replace(
            self,
            normals=normals,
            offsets=self.offsets + (normals * xyz[:, None, :]).sum(-1),
            vertices=_turn(self.vertices, cos[:, None], sin[:, None]) + xyz[:, None, :],
            texture=np.concatenate([axes, shift[..., None]], axis=-1),
        )


def _turn(v: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate vectors (..., 3) about the vertical."""
    x, y = v[..., 0], v[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y, v[..., 2]], axis=-1)


def concatenate(groups: Sequence[Solids]) -> Solids:
    """Join groups of solids that are padded alike."""
    return Solids(**{f.name: np.concatenate([getattr(g, f.name) for g in groups]) for f in fields(Solids)})


MAX_FACES, MAX_VERTICES, MAX_SIDES = 12, 20, 10
NOBODY = np.iinfo(np.int64).min  # the owner of ground and sky


def solids_from(parts: Sequence[Part], owner: int | Sequence[int]) -> Solids:
    """Pack parts into padded arrays; `owner` is one number for all or one for each."""
    vertices = np.stack([_pad(part.vertices, MAX_VERTICES) for part in parts])
    outlines = np.array([_padded_faces(part) for part in parts])
    skins = [[*part.skins, *[part.skins[0]] * (MAX_FACES - len(part.skins))] for part in parts]
    middle = np.stack([part.vertices.mean(axis=0) for part in parts])
    corners = np.take_along_axis(vertices[:, None], outlines[..., None], axis=2)
    normals = np.cross(corners, np.roll(corners, -1, axis=2)).sum(axis=2)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    offsets = (normals * corners[:, :, 0]).sum(-1)
    inward = offsets < (normals * middle[:, None]).sum(-1)
    normals[inward] *= -1
    offsets[inward] *= -1
    texture, density = _texture_axes(corners, normals, np.array([[s.metres or 0.0 for s in row] for row in skins]))
    return Solids(
        normals=normals,
        offsets=offsets,
        vertices=vertices,
        texture=texture,
        density=density,
        tile=np.array([[int(s.tile) for s in row] for row in skins]),
        tint=np.array([[s.tint for s in row] for row in skins]),
        reflect=np.array([[s.reflect for s in row] for row in skins]),
        glow=np.array([[s.glow for s in row] for row in skins]),
        radius=np.linalg.norm(vertices - middle[:, None], axis=-1).max(axis=-1),
        n_faces=np.array([len(part.faces) for part in parts]),
        owner=np.broadcast_to(np.asarray(owner, dtype=np.int64), len(parts)).copy(),
    )


def _pad(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.repeat(values[:1], length - len(values), axis=0)])


def _padded_faces(part: Part) -> list[list[int]]:
    """Vertex indices (K, F); repeating the last corner of a face adds nothing to the sum that gives its normal."""
    faces = [[*face, *[face[-1]] * (MAX_SIDES - len(face))] for face in part.faces]
    return faces + [faces[0]] * (MAX_FACES - len(faces))


def _texture_axes(corners: np.ndarray, normals: np.ndarray, metres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Affine maps (N, K, 2, 4) from points to tile coordinates (right, down) seen from outside, and tiles per metre.

    `metres` (N, K) is the length of a tile, 0 where one tile covers the face.
    """
    level = np.abs(normals[..., 2:]) > 0.95
    right = np.cross(np.where(level, (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)), normals)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    axes = np.stack([right, -np.cross(normals, right)], axis=-2)
    along = (corners[:, :, None] * axes[:, :, :, None]).sum(-1)
    low = along.min(axis=-1)
    extent = np.where(metres[..., None] > 0, metres[..., None], np.maximum(along.max(axis=-1) - low, 1e-3))
    texture = np.concatenate([axes / extent[..., None], -(low / extent)[..., None]], axis=-1)
    return texture, (1 / extent).max(axis=-1)
