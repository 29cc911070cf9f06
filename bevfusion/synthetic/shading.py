"""Colours of a rendered image: textures, sun and ambient light, cast shadows, haze, sky and sensor noise."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np

from bevfusion.synthetic.camera import GROUND, Buffers, Camera, rasterise
from bevfusion.synthetic.geometry import MAX_FACES, Solids
from bevfusion.synthetic.scene import Light, View
from bevfusion.synthetic.textures import LEVELS, SIZE, atlas

HAZE = 320.0  # metres over which haze hides all but 1/e
SHADOW_REACH, SHADOW_CELL = 50.0, 0.125  # metres
NOISE = 0.012


def render(view: View, camera: Camera, rng: np.random.Generator, owners: int) -> tuple[np.ndarray, Buffers]:
    """The picture (H, W, 3) uint8 BGR and what is behind it; `owners` is the number of actors."""
    buffers = rasterise(view.solids, camera, owners)
    return shade(view, camera, buffers, rng), buffers


def shade(view: View, camera: Camera, buffers: Buffers, rng: np.random.Generator) -> np.ndarray:
    """Colour every pixel of a rasterised image; returns (H, W, 3) uint8 BGR."""
    width, height = camera.size
    u = np.arange(width, dtype=np.float32) + np.float32(0.5)
    v = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
    pixels = _Pixels(
        buffers.face,
        1 / np.maximum(buffers.inverse, np.float32(1e-3)),
        [r[0] * u + (r[1] * v + r[2]) for r in camera.rays.astype(np.float32)],
        camera.pose.position.astype(np.float32),
    )
    planes = np.empty((3, height, width), dtype=np.float32)
    _shade_sky(planes, view.light, pixels)
    _shade_ground(planes, view, camera.matrix[0, 0], pixels)
    _shade_solids(planes, _Faces.of(view.solids, view.light, camera, buffers), pixels)
    clear = np.where(buffers.inverse > 0, np.exp(pixels.depth * np.float32(-1 / HAZE)), np.float32(1.0))
    for plane, horizon in zip(planes, view.light.horizon_rgb.tolist(), strict=True):
        plane -= horizon
        plane *= clear
        plane += horizon
    picture = cv2.GaussianBlur(cv2.merge(planes[::-1]), (3, 3), 0.55)
    picture += _noise(height, width, int(rng.integers(2**31)))
    return cv2.convertScaleAbs(np.maximum(picture, 0, out=picture), alpha=255)


@dataclass(frozen=True)
class _Pixels:
    """What is at every pixel: face and depth (H, W), and the ray x, y, z (each (H, W)) of depth 1 from `origin`."""

    face: np.ndarray
    depth: np.ndarray
    rays: list[np.ndarray]
    origin: np.ndarray


def _shade_sky(planes: np.ndarray, light: Light, pixels: _Pixels) -> None:
    """Fill the whole image with the sky, from the horizon to the zenith."""
    x, y, z = pixels.rays
    height = (z / np.sqrt(x * x + y * y + z * z) * np.float32(2.2)).clip(0, 1)
    for plane, low, high in zip(planes, light.horizon_rgb.tolist(), light.zenith_rgb.tolist(), strict=True):
        np.multiply(height, high - low, out=plane)
        plane += low


def _shade_ground(planes: np.ndarray, view: View, focal: float, pixels: _Pixels) -> None:
    """Paint the ground, each band of rows from the mip level that suits its distance."""
    filled = np.flatnonzero((pixels.face == GROUND).any(axis=1))
    if not len(filled):
        return
    rows = slice(filled[0], filled[-1] + 1)
    ground, depth = pixels.face[rows] == GROUND, pixels.depth[rows]
    x, y = (pixels.origin[k] + pixels.rays[k][rows] * depth for k in (0, 1))
    s, d = view.road.to_road(x, y)
    middle = np.where(ground, depth, 0).sum(axis=1) / np.maximum(ground.sum(axis=1), 1)
    footprint = 2.0 * middle / focal / view.ground.cell
    level = np.log2(np.maximum(footprint, 1e-6)).round().clip(0, len(view.ground.texture) - 1).astype(int)
    cuts = [0, *(np.flatnonzero(np.diff(level)) + 1), len(level)]
    colour = np.concatenate([view.ground.colour_at(s[a:b], d[a:b], level[a]) for a, b in pairwise(cuts)])
    column, row = ((c + np.float32(SHADOW_REACH)) * np.float32(1 / SHADOW_CELL) for c in (x, y))
    shadow = cv2.remap(_shadow_map(view), column, row, cv2.INTER_LINEAR)
    light = view.light
    full = (light.ambient_rgb + light.sun_rgb * light.sun[2]).tolist()
    lost = (light.ambient_rgb * 0.25 + light.sun_rgb * light.sun[2]).tolist()
    for plane, channel, a, b in zip(planes, cv2.split(colour), full, lost, strict=True):
        np.copyto(plane[rows], channel * (a - shadow * b), where=ground)


def _shadow_map(view: View) -> np.ndarray:
    """How much of the sun is hidden, float32 in [0, 1], on a grid of ground cells around the origin of the view.

    Every owner casts the hull of its vertices.
    """
    solids, sun = view.solids, view.light.sun
    flat = solids.vertices[..., :2] - solids.vertices[..., 2:] * (sun[:2] / sun[2])
    near = (np.abs(flat) < SHADOW_REACH).all(axis=-1).any(axis=-1)
    pixels = ((flat[near] + SHADOW_REACH) * (16 / SHADOW_CELL)).round().astype(np.int32)
    size = round(2 * SHADOW_REACH / SHADOW_CELL)
    mask = np.zeros((size, size), dtype=np.uint8)
    owner = solids.owner[near]
    order = np.argsort(owner, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1) if len(order) else ():
        cv2.fillConvexPoly(mask, cv2.convexHull(pixels[group].reshape(-1, 2)), 255, shift=4)
    return cv2.blur(mask, (3, 3)).astype(np.float32) * np.float32(1 / 255)


@dataclass(frozen=True)
class _Faces:
    """What shading needs to know of each face in sight.

    row (N,): where a solid's faces begin; texture (2, 4, F) float32: affine maps to tile coordinates; start, size (F,)
    int32: first texel and texels a side of the tile; colour (3, F) float32.
    """

    row: np.ndarray
    texture: np.ndarray
    start: np.ndarray
    size: np.ndarray
    colour: np.ndarray

    @classmethod
    def of(cls, solids: Solids, light: Light, camera: Camera, buffers: Buffers) -> "_Faces":
        used = np.flatnonzero(np.bincount(buffers.face[buffers.face >= 0] // MAX_FACES, minlength=len(solids)))
        row = np.zeros(len(solids), dtype=np.int32)
        row[used] = np.arange(len(used), dtype=np.int32) * MAX_FACES
        solids = solids[used]
        start, size = _mip_levels(solids, camera)
        texture = solids.texture.astype(np.float32).reshape(-1, 2, 4).transpose(1, 2, 0)
        return cls(row, np.ascontiguousarray(texture), start, size, _face_colours(solids, light))


def _shade_solids(planes: np.ndarray, faces: _Faces, pixels: _Pixels) -> None:
    """Look up the texture of every pixel that shows a solid, times its tint and the light on its face."""
    where = np.flatnonzero(pixels.face >= 0)
    if not len(where):
        return
    solid, side = np.divmod(np.take(pixels.face, where), np.int32(MAX_FACES))
    # Indices of any other type are converted anew for each of the many look-ups.
    face = (np.take(faces.row, solid) + side).astype(np.intp)
    depth = np.take(pixels.depth, where)
    x, y, z = (pixels.origin[k] + np.take(pixels.rays[k], where) * depth for k in range(3))
    size = np.take(faces.size, face)
    places = []
    for axis in faces.texture:
        a, b, c, shift = (np.take(row, face) for row in axis)
        # The small inset keeps the far edge of a stretched tile from wrapping round to the near one.
        along = (a * x + b * y + c * z + shift) * np.float32(0.9998) + np.float32(1e-4)
        along -= np.floor(along)
        places.append(np.minimum((along * size).astype(np.int32), size - 1))
    texel = (np.take(faces.start, face) + places[1] * size + places[0]).astype(np.intp)
    for plane, texels, colour in zip(planes, atlas().texels, faces.colour, strict=True):
        plane.ravel()[where] = np.take(texels, texel) * np.take(colour, face)


def _mip_levels(solids: Solids, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """First texel and texels a side (F,) int32 of each face's tile at the level that suits its distance."""
    tiles = atlas()
    middle = solids.vertices.mean(axis=1) - camera.pose.position
    depth = np.maximum((middle * camera.pose.rotation[:, 2]).sum(axis=1), 1.0)
    per_pixel = solids.density * SIZE * (depth / camera.matrix[0, 0])[:, None]
    level = np.log2(np.maximum(per_pixel, 1e-6)).round().clip(0, LEVELS - 1).astype(int)
    return tiles.start[solids.tile, level].ravel(), (SIZE >> level).astype(np.int32).ravel()


def _face_colours(solids: Solids, light: Light) -> np.ndarray:
    """RGB (3, F) float32: tint times light; upward faces see more of the sky than downward ones."""
    sun = np.maximum((solids.normals * light.sun).sum(-1), 0.0)[..., None]
    ambient = (0.80 + 0.20 * solids.normals[..., 2])[..., None]
    lit = solids.tint * (light.ambient_rgb * ambient + light.sun_rgb * sun)
    glow = solids.glow[..., None]
    colour = np.where(glow, solids.tint * light.lamps * 0.62, lit).reshape(-1, 3)
    return np.ascontiguousarray(colour.T, dtype=np.float32)


def _noise(height: int, width: int, start: int) -> np.ndarray:
    """Sensor noise (H, W, 3) float32, cut from one long random row at a place that depends on `start`."""
    pool = _noise_pool(height * width * 3)
    start %= len(pool) - height * width * 3
    return pool[start : start + height * width * 3].reshape(height, width, 3)


@lru_cache(maxsize=1)
def _noise_pool(size: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0.0, NOISE, size + 2**20).astype(np.float32)
