"""The ground-truth database for ObjectPaste: the LiDAR points of every annotated object of the training split."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from nuscenes.eval.detection.constants import DETECTION_NAMES
from tqdm import tqdm

from bevfusion.boxes import legacy_to_lidar
from bevfusion.data.pipelines.points import load_cloud

FOLDER = "nuscenes_gt_database"
POINT_COLUMNS = 5  # x, y, z (m), intensity, ring index in the files; the last becomes the time lag (s)


def write_database(root: Path, infos: Sequence[dict], workers: int = 1) -> dict[str, list[dict]]:
    """Cut the objects of `infos` out of their point clouds, and write one file an object under `root/FOLDER`.

    The folder is built next to its final place and then swapped in, so that it is complete or not there.

    Returns:
        class name -> entries with name, path, image_idx (sample token), gt_idx (row in the info's gt_boxes),
        box3d_lidar (9,) legacy box with velocity, num_points_in_gt, difficulty and group_id.

    Raises:
        InputError: a point cloud is missing or broken.
    """
    building, final, replaced = root / f"{FOLDER}.partial", root / FOLDER, root / f"{FOLDER}.replaced"
    for leftover in (building, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    entries = {name: [] for name in DETECTION_NAMES}
    group = 0
    pool = ThreadPoolExecutor(max(workers, 1))
    try:
        found = pool.map(lambda info: _write_objects(root, building, info), infos)
        for info, objects in tqdm(zip(infos, found, strict=True), "objects", len(infos), unit="frame", disable=None):
            for row, count in objects:
                entries[str(info["gt_names"][row])].append(_entry(info, row, count, group))
                group += 1
    finally:  # also on Ctrl-C: don't work through what is still queued
        pool.shutdown(cancel_futures=True)
    if final.exists():
        final.rename(replaced)
    building.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return entries


def load_points(root: Path, info: dict) -> np.ndarray:
    """Points of a keyframe and its sweeps in the keyframe's LiDAR frame: (N, 5) float32 x, y, z, intensity, time lag.

    As in BEVFusion's loader, points of the sweeps within 1 m of the sensor (in x and y), the car itself, are left out.
    """
    clouds = [load_cloud(str(root / info["lidar_path"]), POINT_COLUMNS)]
    clouds[0][:, 4] = 0
    for sweep in info["sweeps"]:
        points = load_cloud(str(root / sweep["data_path"]), POINT_COLUMNS)
        points = points[(np.abs(points[:, :2]) >= 1).any(axis=1)]
        points[:, :3] = points[:, :3] @ sweep["sensor2lidar_rotation"].T + sweep["sensor2lidar_translation"]
        points[:, 4] = (info["timestamp"] - sweep["timestamp"]) / 1e6
        clouds.append(points)
    return np.concatenate(clouds)


def points_in_boxes(points: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """For each box, the ascending indices of the points inside it (faces included).

    Args:
        points: (N, >=3) x, y, z.
        boxes: (M, >=7) centre, length, width, height, yaw, as `legacy_to_lidar` makes them from an info's boxes.
    """
    order = np.argsort(points[:, 0], kind="stable")
    sorted_x = points[order, 0]
    reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2
    first = np.searchsorted(sorted_x, boxes[:, 0] - reach, "left")
    last = np.searchsorted(sorted_x, boxes[:, 0] + reach, "right")
    inside = []
    for box, start, stop in zip(boxes, first, last, strict=True):
        near = order[start:stop]
        offset = points[near, :3] - box[:3]
        cos, sin = np.cos(box[6]), np.sin(box[6])
        along = offset[:, 0] * cos + offset[:, 1] * sin
        across = offset[:, 1] * cos - offset[:, 0] * sin
        mask = (np.abs(along) <= box[3] / 2) & (np.abs(across) <= box[4] / 2)
        mask &= np.abs(offset[:, 2]) <= box[5] / 2
        inside.append(np.sort(near[mask]))
    return inside


def _write_objects(root: Path, folder: Path, info: dict) -> list[tuple[int, int]]:
    """Write the objects of one frame; (row in gt_boxes, number of points) of each that has points."""
    rows = np.flatnonzero(info["valid_flag"] & np.isin(info["gt_names"], DETECTION_NAMES))
    points = load_points(root, info)
    boxes = info["gt_boxes"][rows]
    written = []
    for row, box, members in zip(rows, boxes, points_in_boxes(points, legacy_to_lidar(boxes)), strict=True):
        if len(members):
            cut = points[members]
            cut[:, :3] -= box[:3]
            (folder / _file_name(info, row)).write_bytes(cut.astype("<f4").tobytes())
            written.append((int(row), len(members)))
    return written


def _entry(info: dict, row: int, count: int, group: int) -> dict:
    velocity = np.nan_to_num(info["gt_velocity"][row])
    return {
        "name": str(info["gt_names"][row]),
        "path": f"{FOLDER}/{_file_name(info, row)}",
        "image_idx": info["token"],
        "gt_idx": row,
        "box3d_lidar": np.concatenate([info["gt_boxes"][row], velocity]).astype(np.float32),
        "num_points_in_gt": count,
        "difficulty": 0,
        "group_id": group,
    }


def _file_name(info: dict, row: int) -> str:
    return f"{info['token']}_{info['gt_names'][row]}_{row}.bin"
