"""Entries of the info files of mmdet3d >= 1.1 (`data_list`), read into `bevfusion.data.records`.

That layout stores 4x4 matrices from the LiDAR to the sensors, rounded to float32, and times in seconds. Boxes are in
mmdet3d 1.0's convention with the gravity centre.
"""

import numpy as np

from bevfusion.data.entry import Entry, column
from bevfusion.data.records import Cameras, Frame, GroundTruth, Sweeps


def read_mmdet3d_frame(info: Entry, metainfo: Entry) -> Frame:
    """One element of `data_list`; `metainfo` holds the class names.

    Raises:
        InputError: a key is missing or has another shape than it should.
    """
    lidar, cameras = info.entry("lidar_points"), info.entry("images")
    readers = [cameras.entry(name) for name in cameras.values]
    sweeps = info.entries("lidar_sweeps") if "lidar_sweeps" in info else []
    clouds = [sweep.entry("lidar_points") for sweep in sweeps]
    return Frame(
        token=info.text("token"),
        scene=info.text("scene_token") if "scene_token" in info else "",
        timestamp=round(float(_microseconds(info.array("timestamp")))),
        location=info.text("location") if "location" in info else None,
        lidar_path=lidar.text("lidar_path"),
        lidar2ego=_nearest_poses(lidar.array("lidar2ego", 4, 4)),
        ego2global=_nearest_poses(info.array("ego2global", 4, 4)),
        cameras=Cameras(
            names=tuple(cameras.values),
            paths=tuple(camera.text("img_path") for camera in readers),
            intrinsics=column(readers, "cam2img", 3, 3),
            camera2ego=_nearest_poses(column(readers, "cam2ego", 4, 4)),
            camera2lidar=_inverses(column(readers, "lidar2cam", 4, 4)),
        ),
        sweeps=Sweeps(
            paths=tuple(cloud.text("lidar_path") for cloud in clouds),
            timestamps=_microseconds(column(sweeps, "timestamp")),
            sweep2lidar=_inverses(column(clouds, "lidar2sensor", 4, 4)),
        ),
        ground_truth=_ground_truth(info.entries("instances"), metainfo) if "instances" in info else None,
    )


def _ground_truth(instances: list[Entry], metainfo: Entry) -> GroundTruth:
    classes = {int(label): name for name, label in metainfo.entry("categories").values.items()}
    boxes = column(instances, "bbox_3d", 7)
    boxes[:, 2] -= boxes[:, 5] / 2
    velocities = [instance.array("velocity", 2, finite=False) for instance in instances]
    labels = column(instances, "bbox_label_3d").astype(int)
    return GroundTruth(
        boxes=np.hstack([boxes, np.array(velocities).reshape(-1, 2)]),
        # label -1 stands for the classes that detection ignores
        names=np.array([classes.get(label, "ignored") for label in labels], dtype=np.str_),
        lidar_points=column(instances, "num_lidar_pts").astype(np.int64),
        valid=column(instances, "bbox_3d_isvalid") > 0,
    )


def _microseconds(times: np.ndarray) -> np.ndarray:
    return np.where(times < 1e12, times * 1e6, times)  # some converters kept nuScenes' microseconds


def _nearest_poses(matrices: np.ndarray) -> np.ndarray:
    """The rigid transforms (..., 4, 4) nearest to rounded ones."""
    left, _, right = np.linalg.svd(matrices[..., :3, :3])
    poses = matrices.copy()
    poses[..., :3, :3] = left @ right
    return poses


def _inverses(matrices: np.ndarray) -> np.ndarray:
    """Inverses (N, 4, 4) of rigid transforms by transposition: the rounded rotations are kept as they are."""
    rotations = np.swapaxes(matrices[:, :3, :3], 1, 2)
    inverses = np.zeros_like(matrices)
    inverses[:, :3, :3], inverses[:, 3, 3] = rotations, 1
    inverses[:, :3, 3:] = -rotations @ matrices[:, :3, 3:]
    return inverses
