"""Entries of the info files of mmdet3d >= 1.1 (`data_list`), read into `bevfusion.data.records`.

That layout stores 4x4 matrices from the LiDAR to the sensors, rounded to float32, and times in seconds. Boxes are in
mmdet3d 1.0's convention with the gravity centre.
"""

import numpy as np

from bevfusion.data.entry import Entry
from bevfusion.data.records import Cameras, Frame, GroundTruth, Sweeps


def read_mmdet3d_frame(info: Entry, metainfo: Entry) -> Frame:
    """One element of `data_list`; `metainfo` holds the class names.

    Raises:
        InputError: a key is missing or has another shape than it should.
    """
    lidar, cameras = info.entry("lidar_points"), info.entry("images")
    readers = [cameras.entry(name) for name in cameras.values]
    sweeps = info.entries("lidar_sweeps") if "lidar_sweeps" in info else []
    return Frame(
        token=info.text("token"),
        scene=info.text("scene_token") if "scene_token" in info else "",
        timestamp=round(_microseconds(info)),
        location=info.text("location") if "location" in info else None,
        lidar_path=lidar.text("lidar_path"),
        lidar2ego=_nearest_pose(lidar.array("lidar2ego", 4, 4)),
        ego2global=_nearest_pose(info.array("ego2global", 4, 4)),
        cameras=Cameras(
            names=tuple(cameras.values),
            paths=tuple(camera.text("img_path") for camera in readers),
            intrinsics=_stack([camera.array("cam2img", 3, 3) for camera in readers], 3),
            camera2ego=_stack([_nearest_pose(camera.array("cam2ego", 4, 4)) for camera in readers], 4),
            camera2lidar=_stack([_inverse(camera.array("lidar2cam", 4, 4)) for camera in readers], 4),
        ),
        sweeps=Sweeps(
            paths=tuple(sweep.entry("lidar_points").text("lidar_path") for sweep in sweeps),
            timestamps=np.array([_microseconds(sweep) for sweep in sweeps], dtype=np.float64),
            sweep2lidar=_stack(
                [_inverse(sweep.entry("lidar_points").array("lidar2sensor", 4, 4)) for sweep in sweeps], 4
            ),
        ),
        ground_truth=_ground_truth(info.entries("instances"), metainfo) if "instances" in info else None,
    )


def _ground_truth(instances: list[Entry], metainfo: Entry) -> GroundTruth:
    labels = {int(label): name for name, label in metainfo.entry("categories").values.items()}
    boxes = np.array([instance.array("bbox_3d", 7) for instance in instances]).reshape(-1, 7)
    boxes[:, 2] -= boxes[:, 5] / 2
    velocities = [instance.array("velocity", 2, finite=False) for instance in instances]
    valid = [bool(instance["bbox_3d_isvalid"]) for instance in instances]
    # label -1 stands for the classes that detection ignores
    names = [labels.get(int(instance.array("bbox_label_3d")), "ignored") for instance in instances]
    return GroundTruth(
        boxes=np.hstack([boxes, np.array(velocities).reshape(-1, 2)]),
        names=np.array(names, dtype=np.str_),
        lidar_points=np.array([instance.array("num_lidar_pts") for instance in instances], dtype=np.int64),
        valid=np.array(valid, dtype=bool),
    )


def _microseconds(entry: Entry) -> float:
    time = float(entry.array("timestamp"))
    return time * 1e6 if time < 1e12 else time  # some converters kept nuScenes' microseconds


def _nearest_pose(matrix: np.ndarray) -> np.ndarray:
    """The rigid transform (4, 4) nearest to a rounded one."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    pose = matrix.copy()
    pose[:3, :3] = left @ right
    return pose


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse (4, 4) of a rigid transform by transposition: the rounded rotation is kept as it is."""
    rotation, translation = matrix[:3, :3].T, matrix[:3, 3]
    inverse = np.eye(4)
    inverse[:3, :3], inverse[:3, 3] = rotation, -rotation @ translation
    return inverse


def _stack(matrices: list[np.ndarray], size: int) -> np.ndarray:
    return np.stack(matrices) if matrices else np.empty((0, size, size))
