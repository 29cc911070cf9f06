"""Pictures of a frame: six camera views with projected boxes, and a bird's-eye view with the LiDAR points.

Everything here works on arrays. Images are (H, W, 3) uint8 RGB. Boxes follow mmdet3d 1.0: (N, >=7) x, y, z of the
bottom, length, width, height, yaw, in the LiDAR frame (nuScenes: x to the right, y ahead, metres).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from bevfusion.errors import InputError

# one colour a label, told apart on dark ground
PALETTE = np.array(
    [
        *((255, 165, 0), (230, 60, 60), (150, 90, 40), (255, 100, 200), (170, 110, 255)),
        *((120, 200, 255), (0, 220, 120), (240, 240, 60), (60, 130, 255), (160, 255, 60)),
    ],
    dtype=np.uint8,
)
WHITE, GREY, BACKGROUND = (255, 255, 255), (110, 110, 110), (24, 24, 28)
# rows of the picture's camera part
CAMERA_ROWS = (("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"), ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"))
# corners 0-3: bottom, 4-7: top; 0 and 1 (4 and 5) are at the front
EDGES = np.array([(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)])
FRONT = (0, 4)  # the two front edges among EDGES
NEAR = 0.2  # m in front of a camera; what is nearer is cut off
HEIGHTS = (-3.0, 3.0)  # m, the ends of the colour scale of points


@dataclass(frozen=True)
class Objects:
    """Boxes (N, >=7) with labels (N,) and, if they are detections, scores (N,)."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None

    def select(self, keep: np.ndarray) -> "Objects":
        """The objects at a mask or index array."""
        return Objects(self.boxes[keep], self.labels[keep], None if self.scores is None else self.scores[keep])


@dataclass(frozen=True)
class SensorData:
    """What the sensors of one frame saw.

    images: camera name -> image; lidar2image: camera name -> (4, 4) from LiDAR to pixels of that image;
    points: (N, >=3) in the LiDAR frame.
    """

    token: str
    images: Mapping[str, np.ndarray]
    lidar2image: Mapping[str, np.ndarray]
    points: np.ndarray


def box_corners(boxes: np.ndarray) -> np.ndarray:
    """(N, 8, 3) corners: bottom front-left, front-right, rear-right, rear-left, then the same four at the top."""
    unit = (
        np.array([(1, 1, 0), (1, -1, 0), (-1, -1, 0), (-1, 1, 0), (1, 1, 2), (1, -1, 2), (-1, -1, 2), (-1, 1, 2)]) / 2
    )
    local = unit * boxes[:, None, 3:6]
    cos, sin = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    turned = np.stack([local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos], axis=-1)
    return np.concatenate([turned, local[..., 2:]], axis=-1) + boxes[:, None, :3]


def project_segments(segments: np.ndarray, lidar2image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project line segments (N, 2, 3), cut at the near plane.

    Returns:
        pixels (N, 2, 2), and a mask (N,) of the segments that are at least partly in front of the camera.
    """
    rays = segments @ lidar2image[:3, :3].T + lidar2image[:3, 3]
    depth = rays[..., 2]
    # a segment with one end behind the near plane starts where it crosses the plane
    share = np.clip((NEAR - depth) / np.where(depth == depth[:, ::-1], 1, depth[:, ::-1] - depth), 0, 1)
    cut = rays + np.where(depth < NEAR, share, 0)[..., None] * (rays[:, ::-1] - rays)
    return cut[..., :2] / np.maximum(cut[..., 2:], NEAR), (depth >= NEAR).any(axis=1)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, lidar2image: np.ndarray, colours: np.ndarray, thickness: int = 2
) -> None:
    """Draw 3D boxes (N, >=7) into `image` in place, far ones first; the front is thicker and has a heading line."""
    corners = box_corners(boxes)
    middle = corners[:, :4].mean(axis=1)
    heading = np.stack([middle, corners[:, :2].mean(axis=1)], axis=1)
    segments = np.concatenate([corners[:, EDGES], heading[:, None]], axis=1)
    depth = middle @ lidar2image[2, :3] + lidar2image[2, 3]
    for index in np.argsort(-depth):
        pixels, visible = project_segments(segments[index], lidar2image)
        for number in np.flatnonzero(visible):
            width = thickness + 1 if number in FRONT else thickness
            _line(image, *pixels[number], colours[index], width)


def draw_birds_eye_view(
    points: np.ndarray, layers: Sequence[tuple[np.ndarray, np.ndarray, int]], size: int = 1080, reach: float = 54.0
) -> np.ndarray:
    """Bird's-eye view (size, size, 3), +y up, of points coloured by height and of boxes.

    Args:
        points: (N, >=3).
        layers: (boxes (M, >=7), colours (M, 3), line width) each, drawn in this order.
        reach: metres from the centre to an edge of the picture.
    """
    image = np.full((size, size, 3), BACKGROUND, np.uint8)
    scale = size / (2 * reach)

    def pixels(xy: np.ndarray) -> np.ndarray:
        return np.stack([size / 2 + xy[..., 0] * scale, size / 2 - xy[..., 1] * scale], axis=-1)

    for radius in range(10, int(reach) + 1, 10):
        cv2.circle(image, (size // 2, size // 2), round(radius * scale), (60, 60, 66), 1, cv2.LINE_AA)
        _text(image, f"{radius} m", (size // 2 + 3, round(size / 2 - radius * scale) - 3), (170, 170, 170), 0.45)
    ordered = points[np.argsort(points[:, 2])]
    where = np.floor(pixels(ordered[:, :2])).astype(np.int64)
    inside = ((where >= 0) & (where < size - 1)).all(axis=1)
    shades = height_colours(ordered[inside, 2])
    for across, down in np.ndindex(2, 2):  # a point is 2 x 2 pixels, higher ones on top
        image[where[inside, 1] + down, where[inside, 0] + across] = shades
    cv2.arrowedLine(image, (size // 2, size // 2 + 9), (size // 2, size // 2 - 12), WHITE, 2, cv2.LINE_AA, 0, 0.4)
    for boxes, colours, width in layers:
        footprints = box_corners(boxes)[:, :4, :2]
        for footprint, colour in zip(footprints, colours, strict=True):
            heading = (footprint.mean(axis=0), footprint[:2].mean(axis=0))
            edges = [(footprint[k], footprint[(k + 1) % 4]) for k in range(4)]
            for number, ends in enumerate([*edges, heading]):
                _line(image, *pixels(np.array(ends)), colour, width + (number == 0))
    return image


def height_colours(heights: np.ndarray) -> np.ndarray:
    """(N, 3) RGB of heights (N,) in metres on the scale that the legend shows."""
    low, high = HEIGHTS
    levels = np.clip((heights - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    return cv2.applyColorMap(levels.reshape(-1, 1), cv2.COLORMAP_TURBO).reshape(-1, 3)[:, ::-1]


def drawn_layers(
    classes: Sequence[str], truth: Objects | None = None, detections: Objects | None = None
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """What to draw of a frame: (boxes, colours, line width) each, in this order.

    Detections have their class's colour; ground truth is thin and white, or has its class's colour where there are no
    detections. Objects with a label that is not in `classes` (such as -1) are left out.
    """
    shown = []
    for objects, alone in ((truth, detections is None), (detections, True)):
        if objects is not None:
            objects = objects.select((objects.labels >= 0) & (objects.labels < len(classes)))
            colours = PALETTE[objects.labels % len(PALETTE)]
            shown.append((objects.boxes, colours if alone else np.full_like(colours, 255), 2 if alone else 1))
    return shown


def camera_views(frame: SensorData, layers: Sequence[tuple[np.ndarray, np.ndarray, int]], width: int) -> np.ndarray:
    """The six camera views, each `width` pixels wide, in two rows; `layers` as in `draw_birds_eye_view`."""
    rows = [np.hstack([_camera_tile(frame, name, layers, width) for name in row]) for row in CAMERA_ROWS]
    return np.vstack(rows)


def render_frame(
    frame: SensorData,
    classes: Sequence[str],
    truth: Objects | None = None,
    detections: Objects | None = None,
    title: str = "",
    camera_width: int = 560,
) -> np.ndarray:
    """One picture of a frame: camera views above, bird's-eye view with legend and counts below.

    See `drawn_layers` for the colours.
    """
    shown = drawn_layers(classes, truth, detections)
    cameras = camera_views(frame, shown, camera_width)
    width = cameras.shape[1]
    size = width * 3 // 4
    legend = _legend(np.full((size, width - size, 3), BACKGROUND, np.uint8), classes, truth, detections)
    below = np.hstack([legend, draw_birds_eye_view(frame.points, shown, size)])
    header = np.full((44, width, 3), BACKGROUND, np.uint8)
    _text(header, "   ".join(part for part in (title, f"sample {frame.token}") if part), (14, 30), WHITE, 0.75)
    return np.vstack([header, cameras, below])


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write a picture, all of it or nothing; raises InputError if it can't be written."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(cv2.imencode(path.suffix, np.ascontiguousarray(image[..., ::-1]))[1].tobytes())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"can't write the picture {path}: {error.strerror}") from error


def _camera_tile(frame: SensorData, name: str, layers: Sequence[tuple], width: int) -> np.ndarray:
    """One camera's image, scaled to 16:9, with boxes; grey if the frame has no such camera."""
    height = width * 9 // 16
    if name not in frame.images:
        tile = np.full((height, width, 3), BACKGROUND, np.uint8)
    else:
        image = frame.images[name]
        # lines are drawn at twice the size, which makes those of small boxes thinner than a pixel
        large = cv2.resize(image, (2 * width, 2 * height), interpolation=cv2.INTER_AREA)
        scale = np.diag([2 * width / image.shape[1], 2 * height / image.shape[0], 1, 1])
        for boxes, colours, thickness in layers:
            draw_boxes(large, boxes, scale @ frame.lidar2image[name], colours, thickness)
        tile = cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA)
    _text(tile, name, (8, 20), WHITE, 0.5)
    return tile


def _legend(panel: np.ndarray, classes: Sequence[str], truth: Objects | None, detections: Objects | None) -> np.ndarray:
    """Class colours with the numbers of objects, line styles, and the scale of heights."""
    layers = [(name, objects) for name, objects in (("truth", truth), ("found", detections)) if objects is not None]
    columns = [(name, panel.shape[1] - 60 * (len(layers) - k)) for k, (name, _) in enumerate(layers)]
    for name, x in columns:
        _text(panel, name, (x, 40), GREY, 0.5)
    for label, name in enumerate(classes):
        y = 70 + 26 * label
        cv2.line(panel, (14, y - 5), (40, y - 5), PALETTE[label % len(PALETTE)].tolist(), 3)
        _text(panel, name, (50, y), WHITE, 0.5)
        for (_, objects), (_, x) in zip(layers, columns, strict=True):
            _text(panel, str(int((objects.labels == label).sum())), (x, y), WHITE, 0.5)
    y = 90 + 26 * len(classes)
    if detections is not None and truth is not None:
        cv2.line(panel, (14, y - 5), (40, y - 5), WHITE, 1)
        _text(panel, "ground truth", (50, y), WHITE, 0.5)
    _text(panel, "height of points", (14, y + 40), WHITE, 0.5)
    scale = height_colours(np.linspace(*HEIGHTS, panel.shape[1] - 60))
    panel[y + 50 : y + 64, 14 : 14 + len(scale)] = scale
    _text(panel, f"{HEIGHTS[0]:+.0f} m", (14, y + 84), GREY, 0.45)
    _text(panel, f"{HEIGHTS[1]:+.0f} m", (len(scale) - 26, y + 84), GREY, 0.45)
    return panel


def _line(image: np.ndarray, start: np.ndarray, stop: np.ndarray, colour: Sequence[int], width: int) -> None:
    ends = np.clip(np.round([start, stop]), -(2**20), 2**20).astype(int).tolist()
    height, columns = image.shape[:2]
    crosses, first, last = cv2.clipLine((-8, -8, columns + 16, height + 16), ends[0], ends[1])
    if crosses:
        cv2.line(image, first, last, [int(value) for value in colour], width, cv2.LINE_AA)


def _text(image: np.ndarray, text: str, origin: tuple[int, int], colour: Sequence[int], scale: float) -> None:
    cv2.putText(image, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 3, cv2.LINE_AA)
    cv2.putText(image, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
