"""What pinhole cameras see: a depth buffer filled solid by solid; `shading` then colours all pixels in one pass.

In a pinhole image ``1 / depth`` of a plane is linear in the pixel coordinates, so a convex solid is the minimum over
its near planes where that exceeds the maximum over its far planes: no polygon is clipped or scan-converted, and every
pixel has the exact depth at its centre.
"""

from dataclasses import dataclass

import numpy as np

from bevfusion.synthetic.geometry import MAX_FACES, NOBODY, Solids
from bevfusion.synthetic.rig import Pose

NEAR = 0.1  # metres
TINY = 1.0  # pixels: what looks smaller is left out
SKY, GROUND = -2, -1


@dataclass(frozen=True)
class Camera:
    """Camera matrix (3, 3), image size (width, height) in pixels, pose (camera to view)."""

    matrix: np.ndarray
    size: tuple[int, int]
    pose: Pose

    @property
    def rays(self) -> np.ndarray:
        """(3, 3): maps (u, v, 1) to a direction in the view whose depth is 1."""
        return self.pose.rotation @ np.linalg.inv(self.matrix)


@dataclass(frozen=True)
class Buffers:
    """inverse (H, W) float32: 1 / depth; face (H, W) int32: solid * MAX_FACES + face, or GROUND, or SKY.

    `alone` (A,) and `visible` (A,): pixels that an owner would cover on its own, and that it does cover.
    """

    inverse: np.ndarray
    face: np.ndarray
    alone: np.ndarray
    visible: np.ndarray

    def owners(self, solids: Solids) -> np.ndarray:
        """Owner of each pixel (H, W); ground and sky are `NOBODY`."""
        owner = np.full(self.face.shape, NOBODY)
        solid = self.face >= 0
        owner[solid] = solids.owner[self.face[solid] // MAX_FACES]
        return owner


def rasterise(solids: Solids, camera: Camera, owners: int) -> Buffers:
    """Find the nearest surface at every pixel, and how much of every owner is seen."""
    width, height = camera.size
    u = np.arange(width, dtype=np.float32) + np.float32(0.5)
    v = np.arange(height, dtype=np.float32) + np.float32(0.5)
    rays, position = camera.rays, camera.pose.position
    down = (-rays[2] / position[2]).astype(np.float32)
    inverse = np.maximum(np.add.outer(down[1] * v + down[2], down[0] * u), 0.0)
    face = np.where(inverse > 0, GROUND, SKY).astype(np.int32)
    rects, nearest = _rectangles(solids, camera)
    room = solids.offsets - (solids.normals * position).sum(-1)
    entering = room < 0
    w = solids.normals / room[..., None]
    planes = (w[..., :1] * rays[0] + w[..., 1:2] * rays[1] + w[..., 2:] * rays[2]).astype(np.float32)
    alone = np.zeros(owners, dtype=np.int64)
    wanted = np.flatnonzero((rects[:, 2] > rects[:, 0]) & (rects[:, 3] > rects[:, 1]) & entering.any(axis=1))
    wanted = wanted[solids.radius[wanted] * 2 * camera.matrix[0, 0] > TINY * nearest[wanted]]
    painter = _Painter.of(u, v, planes, entering, solids, wanted)
    actors = wanted[solids.owner[wanted] >= 0]
    for group in np.split(actors, np.flatnonzero(np.diff(solids.owner[actors])) + 1) if len(actors) else ():
        alone[solids.owner[group[0]]] = _paint_owner(painter, group, rects, inverse, face)
    things = wanted[solids.owner[wanted] < 0]
    # Near things first: then most of the others are found to be hidden before they are painted.
    for i in things[np.argsort(nearest[things], kind="stable")]:
        x0, y0, x1, y1 = rects[i]
        if inverse[y0:y1, x0:x1].min() < 1 / nearest[i]:
            painter.paint(i, rects[i], inverse, face, (0, 0))
    seen = face[face >= 0] // MAX_FACES
    visible = np.bincount(solids.owner[seen].clip(-1) + 1, minlength=owners + 1)[1:]
    return Buffers(inverse, face, alone, visible)


def _paint_owner(
    painter: "_Painter", group: np.ndarray, rects: np.ndarray, inverse: np.ndarray, face: np.ndarray
) -> int:
    """Paint all solids of one owner; returns how many pixels they cover together, hidden or not."""
    x0, y0 = rects[group, :2].min(axis=0)
    x1, y1 = rects[group, 2:].max(axis=0)
    own = np.zeros((y1 - y0, x1 - x0), dtype=np.float32)
    own_face = np.empty(own.shape, dtype=np.int32)
    for i in group:
        painter.paint(i, rects[i], own, own_face, (x0, y0))
    shown = own > inverse[y0:y1, x0:x1]
    np.copyto(inverse[y0:y1, x0:x1], own, where=shown)
    np.copyto(face[y0:y1, x0:x1], own_face, where=shown)
    return int(np.count_nonzero(own))


@dataclass(frozen=True)
class _Painter:
    """Pixel centres u (W,), v (H,), and of every solid its near and far faces.

    A face is a tuple (number, a, b, c) with ``1 / depth = a u + b v + c``.
    """

    u: np.ndarray
    v: np.ndarray
    near: dict[int, list[tuple[int, float, float, float]]]
    far: dict[int, list[tuple[int, float, float, float]]]

    @classmethod
    def of(
        cls, u: np.ndarray, v: np.ndarray, planes: np.ndarray, entering: np.ndarray, solids: Solids, wanted: np.ndarray
    ) -> "_Painter":
        near, far = {}, {}
        for i in wanted.tolist():
            count = solids.n_faces[i]
            near[i], far[i] = [], []
            for k, (ahead, plane) in enumerate(
                zip(entering[i, :count].tolist(), planes[i, :count].tolist(), strict=True)
            ):
                (near if ahead else far)[i].append((i * MAX_FACES + k, *plane))
        return cls(u, v, near, far)

    def paint(
        self, i: int, rect: tuple[int, int, int, int], inverse: np.ndarray, face: np.ndarray, corner: tuple[int, int]
    ) -> None:
        """Enter solid `i` into the buffers wherever it is nearer; their first pixel is `corner` of the image."""
        x0, y0, x1, y1 = rect
        u, v = self.u[x0:x1], self.v[y0:y1, None]
        (number, a, b, c), *others = self.near[i]
        near = a * u + (b * v + c)
        which = np.full(near.shape, number, dtype=np.int32) if others else number
        for number, a, b, c in others:
            depth = a * u + (b * v + c)
            np.copyto(which, number, where=depth < near)
            np.minimum(near, depth, out=near)
        window = np.s_[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
        hit = near > inverse[window]
        for _, a, b, c in self.far[i]:
            hit &= near > a * u + (b * v + c)
        np.copyto(inverse[window], near, where=hit)
        np.copyto(face[window], which, where=hit)


def _rectangles(solids: Solids, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Pixel rectangles (N, 4), x0, y0, x1, y1, that contain each solid (empty: out of sight), and least depths (N,)."""
    seen = np.einsum("nvi,ij->nvj", solids.vertices - camera.pose.position, camera.pose.rotation)
    depth = seen[..., 2]
    nearest = np.maximum(depth.min(axis=1), NEAR)
    rects = np.zeros((len(solids), 4), dtype=np.int64)
    in_front = depth.min(axis=1) > NEAR
    for index, points in ((np.flatnonzero(in_front), seen[in_front]), *_clipped(seen, in_front)):
        x, y = (points[..., k] / points[..., 2] * camera.matrix[k, k] + camera.matrix[k, 2] for k in (0, 1))
        bounds = np.stack([x.min(-1), y.min(-1), x.max(-1) + 1, y.max(-1) + 1], axis=-1)
        rects[index] = np.floor(bounds.clip(-1, 1e6))
    rects[:, (0, 2)] = rects[:, (0, 2)].clip(0, camera.size[0])
    rects[:, (1, 3)] = rects[:, (1, 3)].clip(0, camera.size[1])
    return rects, nearest


def _clipped(seen: np.ndarray, in_front: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """For solids that reach behind the camera: their vertices in front of it, and where edges pass its near plane."""
    clipped = []
    for i in np.flatnonzero(~in_front & (seen[..., 2].max(axis=1) > NEAR)):
        inside = seen[i, :, 2] > NEAR
        ahead, behind = seen[i, inside], seen[i, ~inside]
        share = (ahead[:, None, 2:] - NEAR) / (ahead[:, None, 2:] - behind[None, :, 2:])
        cuts = ahead[:, None] + share * (behind[None] - ahead[:, None])
        clipped.append((i, np.concatenate([ahead, cuts.reshape(-1, 3)])))
    return clipped
