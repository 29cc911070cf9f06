"""One nuScenes sample -> one info entry in the layout that BEVFusion's data sets read.

The layout and the box convention are those of the original BEVFusion (MIT) info files, except that paths are relative
to the data root, so that the root can be moved and the file's bytes do not depend on how it was spelled.
"""

from pathlib import Path

import numpy as np
from nuscenes import NuScenes
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.geometry_utils import transform_matrix
from pyquaternion import Quaternion
from scipy.spatial.transform import Rotation

from bevfusion.errors import InputError

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")


class SampleConverter:
    """Turns samples of one nuScenes version into info entries.

    Args:
        nuscenes: opened tables.
        max_sweeps: how many LiDAR sweeps before the keyframe an entry lists (fewer at the start of a scene).
        with_boxes: whether to add the annotations (the test split has none).
    """

    def __init__(self, nuscenes: NuScenes, max_sweeps: int, with_boxes: bool):
        self.nuscenes, self.max_sweeps, self.with_boxes = nuscenes, max_sweeps, with_boxes
        self._listings: dict[str, frozenset[str]] = {}

    def __call__(self, sample: dict) -> dict:
        """Info entry of one record of the sample table.

        Raises:
            InputError: a sensor or one of the sample's files is missing.
        """
        nuscenes = self.nuscenes
        missing = [channel for channel in ("LIDAR_TOP", *CAMERAS) if channel not in sample["data"]]
        if missing:
            raise InputError(f"sample {sample['token']} has no keyframe of {missing[0]} in sample_data.json")
        lidar = nuscenes.get("sample_data", sample["data"]["LIDAR_TOP"])
        sensor2ego, ego2global = self._poses(lidar)
        global2lidar = np.linalg.inv(_matrix(ego2global) @ _matrix(sensor2ego))
        scene = nuscenes.get("scene", sample["scene_token"])
        info = {
            "lidar_path": self._existing(lidar["filename"]),
            "token": sample["token"],
            "scene_token": scene["token"],
            "sweeps": [self._sensor(sweep, "lidar", global2lidar) for sweep in self._sweeps(lidar)],
            "cams": {channel: self._camera(sample["data"][channel], channel, global2lidar) for channel in CAMERAS},
            "lidar2ego_translation": sensor2ego["translation"],
            "lidar2ego_rotation": sensor2ego["rotation"],
            "ego2global_translation": ego2global["translation"],
            "ego2global_rotation": ego2global["rotation"],
            "timestamp": sample["timestamp"],
            "location": nuscenes.get("log", scene["log_token"])["location"],
        }
        if self.with_boxes:
            info.update(self._boxes(sample, global2lidar))
        return info

    def is_available(self, scene: dict) -> bool:
        """Whether the LiDAR file of the scene's first keyframe is on disk (nuScenes is downloaded in parts)."""
        sample = self.nuscenes.get("sample", scene["first_sample_token"])
        return "LIDAR_TOP" not in sample["data"] or self._exists(
            self.nuscenes.get("sample_data", sample["data"]["LIDAR_TOP"])["filename"]
        )

    def _exists(self, filename: str) -> bool:
        # one listing a folder is far cheaper than half a million stat calls on a network disk
        folder, _, name = filename.rpartition("/")
        if folder not in self._listings:
            path = Path(self.nuscenes.dataroot, folder)
            self._listings[folder] = frozenset(item.name for item in path.iterdir()) if path.is_dir() else frozenset()
        return name in self._listings[folder]

    def _existing(self, filename: str) -> str:
        if not self._exists(filename):
            raise InputError(
                f"{Path(self.nuscenes.dataroot, filename)} is named in sample_data.json but does not exist; "
                "extract the missing part of nuScenes"
            )
        return filename

    def _poses(self, record: dict) -> tuple[dict, dict]:
        """Calibration (sensor to ego) and ego pose (ego to global) of a sample_data record."""
        return (
            self.nuscenes.get("calibrated_sensor", record["calibrated_sensor_token"]),
            self.nuscenes.get("ego_pose", record["ego_pose_token"]),
        )

    def _sweeps(self, record: dict) -> list[dict]:
        """The sample_data records before `record`, latest first, at most `max_sweeps`."""
        sweeps = []
        while len(sweeps) < self.max_sweeps and record["prev"]:
            record = self.nuscenes.get("sample_data", record["prev"])
            sweeps.append(record)
        return sweeps

    def _sensor(self, record: dict, kind: str, global2lidar: np.ndarray) -> dict:
        """Path, poses and time of a sensor reading; sensor2lidar leads into the keyframe's LiDAR frame."""
        sensor2ego, ego2global = self._poses(record)
        sensor2lidar = global2lidar @ _matrix(ego2global) @ _matrix(sensor2ego)
        return {
            "data_path": self._existing(record["filename"]),
            "type": kind,
            "sample_data_token": record["token"],
            "sensor2ego_translation": sensor2ego["translation"],
            "sensor2ego_rotation": sensor2ego["rotation"],
            "ego2global_translation": ego2global["translation"],
            "ego2global_rotation": ego2global["rotation"],
            "timestamp": record["timestamp"],
            "sensor2lidar_rotation": sensor2lidar[:3, :3].copy(),
            "sensor2lidar_translation": sensor2lidar[:3, 3].copy(),
        }

    def _camera(self, token: str, channel: str, global2lidar: np.ndarray) -> dict:
        record = self.nuscenes.get("sample_data", token)
        intrinsics = self._poses(record)[0]["camera_intrinsic"]
        camera = self._sensor(record, channel, global2lidar)
        return {**camera, "camera_intrinsics": np.array(intrinsics, dtype=np.float64).reshape(3, 3)}

    def _boxes(self, sample: dict, global2lidar: np.ndarray) -> dict:
        """Annotations in the LiDAR frame: gt_boxes (N, 7) legacy, names, velocities (N, 2) m/s, point counts."""
        records = [self.nuscenes.get("sample_annotation", token) for token in sample["anns"]]
        rotation, shift = global2lidar[:3, :3], global2lidar[:3, 3]
        centres = _column(records, "translation", 3) @ rotation.T + shift
        quaternions = _column(records, "rotation", 4)
        turned = np.empty((0, 3, 3))
        if records:
            turned = rotation @ Rotation.from_quat(quaternions[:, [1, 2, 3, 0]]).as_matrix()
        # the angle that pyquaternion's yaw_pitch_roll calls yaw, which the original converter uses
        yaw = np.arctan2(-turned[:, 0, 1], turned[:, 0, 0])
        speeds = np.array([self.nuscenes.box_velocity(token)[:2] for token in sample["anns"]]).reshape(-1, 2)
        lidar_points = np.array([record["num_lidar_pts"] for record in records], dtype=np.int64)
        radar_points = np.array([record["num_radar_pts"] for record in records], dtype=np.int64)
        names = [category_to_detection_name(record["category_name"]) or record["category_name"] for record in records]
        return {
            "gt_boxes": np.column_stack([centres, _column(records, "size", 3), -yaw - np.pi / 2]),
            "gt_names": np.array(names, dtype=np.str_),
            "gt_velocity": speeds @ rotation[:2, :2].T,
            "num_lidar_pts": lidar_points,
            "num_radar_pts": radar_points,
            "valid_flag": lidar_points + radar_points > 0,
        }


def _matrix(record: dict) -> np.ndarray:
    """(4, 4) transform of a record with a translation and a rotation quaternion (w, x, y, z)."""
    return transform_matrix(record["translation"], Quaternion(record["rotation"]))


def _column(records: list[dict], field: str, width: int) -> np.ndarray:
    return np.array([record[field] for record in records], dtype=np.float64).reshape(-1, width)
