"""Takes one keyframe of a scene: renders its sensor files and notes what the tables need to know."""

import json
import os
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from bevfusion.synthetic.build import build_scene
from bevfusion.synthetic.camera import Camera
from bevfusion.synthetic.lidar import Sweep, scan
from bevfusion.synthetic.options import KEYFRAME_PERIOD, Options, Shot
from bevfusion.synthetic.rig import CAMERAS, LIDAR, Pose, Sensor, quaternion, rotation_matrix
from bevfusion.synthetic.scene import MARGIN, Scene, generator
from bevfusion.synthetic.shading import render

JPEG_QUALITY = 88
ANNOTATED = 80.0  # metres from the ego vehicle within which objects are annotated
MAP_CELL = 0.1  # metres a pixel, what the devkit expects

SENSORS = {sensor.channel: sensor for sensor in (*CAMERAS, LIDAR)}
cached_scene = lru_cache(maxsize=2)(build_scene)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either not there or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def record_path(out: Path, name: str, keyframe: int) -> Path:
    """Where the notes on a keyframe wait for the tables to be written."""
    return out / ".records" / name / f"{keyframe:03d}.json"


def map_file(name: str) -> str:
    """Path of a scene's map within the data set."""
    return f"maps/{name}.png"


def sensor_pose(scene: Scene, sensor: Sensor, t: float) -> tuple[Pose, np.ndarray]:
    """Pose of a sensor in the view around the ego vehicle at time `t`, and the centre (2,) of that view."""
    translation, rotation = scene.ego.pose(scene.road, t)
    turn = rotation_matrix(rotation)
    position = turn @ np.array(sensor.translation) + [0.0, 0.0, translation[2]]
    return Pose(turn @ rotation_matrix(sensor.rotation), position), translation[:2]


def take_sweep(scene: Scene, options: Options, t: float) -> Sweep:
    """One turn of the LiDAR that ends at time `t`."""
    pose, centre = sensor_pose(scene, LIDAR, t)
    rng = generator(options.seed, scene.name, "LIDAR_TOP", f"{t:.6f}")
    if not options.sweep_motion:
        return scan(scene.view(t, centre), pose, rng)
    step = 1e-3
    (_, before), (_, after) = (scene.ego.motion.pose(scene.road, t + dt) for dt in (-step, step))
    (start, _), (end, _) = (scene.ego.pose(scene.road, t + dt) for dt in (-step, step))
    moving = Pose(pose.rotation, pose.position, (end - start) / (2 * step), float(after - before) / (2 * step))
    return scan(scene.view(t, centre), moving, rng, scene.velocities(t))


def take_picture(scene: Scene, options: Options, sensor: Sensor, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture (H, W, 3) uint8 BGR, and of every actor the pixels it would cover alone and those that it does cover."""
    pose, centre = sensor_pose(scene, sensor, t)
    camera = Camera(sensor.matrix(options.image_size), options.image_size, pose)
    rng = generator(options.seed, scene.name, sensor.channel, f"{t:.6f}")
    picture, buffers = render(scene.view(t, centre), camera, rng, len(scene.actors))
    return picture, buffers.alone, buffers.visible


def capture(options: Options, out: Path, name: str, keyframe: int) -> None:
    """Write all files of a keyframe, and last of all its record."""
    scene = cached_scene(options.seed, name, options.duration)
    if keyframe == 0:
        mask = cv2.imencode(".png", scene.ground.walk_mask(MAP_CELL))[1]
        write_atomically(out / map_file(name), mask.tobytes())
    points, alone, visible = np.zeros((3, len(scene.actors)), dtype=np.int64)
    for shot in options.shots(name, keyframe):
        sensor = SENSORS[shot.channel]
        if sensor is LIDAR:
            sweep = take_sweep(scene, options, shot.time)
            data = sweep.points.tobytes()
            if shot.is_key_frame:
                points += points_in_boxes(scene, sweep, shot.time)
        else:
            picture, covers, shows = take_picture(scene, options, sensor, shot.time)
            data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
            if shot.is_key_frame:
                alone, visible = alone + covers, visible + shows
        write_atomically(out / shot.filename, data)
    record = {
        "dusk": scene.light.dusk,
        "shots": [_shot_row(scene, shot) for shot in options.shots(name, keyframe)],
        "objects": _object_rows(scene, keyframe * KEYFRAME_PERIOD, points, alone, visible),
    }
    write_atomically(record_path(out, name, keyframe), json.dumps(record).encode())


def points_in_boxes(scene: Scene, sweep: Sweep, t: float) -> np.ndarray:
    """Number of returns (A,) from every actor that lie in its annotated box; the ground under it does not count."""
    pose, centre = sensor_pose(scene, LIDAR, t)
    mine = sweep.owner >= 0
    owner = sweep.owner[mine]
    xyz, yaw = scene.poses(t)
    spot = sweep.points[mine, :3].astype(np.float64) @ pose.rotation.T + pose.position
    offset = spot - (xyz - [*centre, 0.0])[owner]
    cos, sin = np.cos(yaw[owner]), np.sin(yaw[owner])
    size = np.array([actor.size for actor in scene.actors])[owner] + MARGIN
    inside = np.abs(cos * offset[:, 0] + sin * offset[:, 1]) <= size[:, 0] / 2
    inside &= np.abs(cos * offset[:, 1] - sin * offset[:, 0]) <= size[:, 1] / 2
    inside &= (offset[:, 2] >= 0) & (offset[:, 2] <= size[:, 2])
    return np.bincount(owner[inside], minlength=len(scene.actors))


def _shot_row(scene: Scene, shot: Shot) -> dict:
    translation, rotation = scene.ego.pose(scene.road, shot.time)
    return {
        "channel": shot.channel,
        "timestamp": shot.timestamp,
        "is_key_frame": shot.is_key_frame,
        "filename": shot.filename,
        "ego_translation": translation.tolist(),
        "ego_rotation": list(rotation),
    }


def _object_rows(scene: Scene, t: float, points: np.ndarray, alone: np.ndarray, visible: np.ndarray) -> list[dict]:
    xyz, yaw = scene.poses(t)
    ego, _ = scene.ego.pose(scene.road, t)
    rows = []
    for i in np.flatnonzero(np.hypot(*(xyz - ego)[:, :2].T) < ANNOTATED):
        actor = scene.actors[i]
        length, width, height = np.array(actor.size) + MARGIN
        rows.append(
            {
                "object": int(i),
                "category": actor.category,
                "attribute": actor.attribute(t),
                "translation": [round(float(v), 4) for v in (*xyz[i, :2], height / 2)],
                "size": [round(float(v), 3) for v in (width, length, height)],
                "rotation": list(quaternion(float(yaw[i]))),
                "points": int(points[i]),
                "visible": int(visible[i]),
                "alone": int(alone[i]),
            }
        )
    return rows
