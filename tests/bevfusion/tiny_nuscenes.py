"""A nuScenes v1.0 data set of two short scenes with known geometry, small enough to write in every test."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

SCENES = ("scene-0061", "scene-0103")  # the first is in mini_train, the second in mini_val
KEYFRAMES = 3
SWEEPS_BETWEEN = 2
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
CAMERA_YAW = (0.0, -1.0, 1.0, 3.1, 1.9, -1.9)
LIDAR2EGO = ([0.9, 0.0, 1.8], Rotation.from_euler("zyx", [-1.55, 0.02, -0.01]))
EGO_SPEED = np.array([4.0, 1.0, 0.0])  # m/s
EGO_START = np.array([400.0, 1100.0, 0.0])
# category, attribute, size (width, length, height), start relative to the ego's start, velocity, yaw, LiDAR points
OBJECTS = (
    ("vehicle.car", "vehicle.moving", (1.9, 4.5, 1.6), (12.0, 4.0, 0.8), (6.0, -1.0), 0.3, 40),
    ("human.pedestrian.adult", "pedestrian.standing", (0.7, 0.8, 1.8), (8.0, -6.0, 0.9), (0.0, 0.0), -2.0, 12),
    ("movable_object.trafficcone", "", (0.4, 0.4, 1.0), (-7.0, 5.0, 0.5), (0.0, 0.0), 1.0, 6),
    ("vehicle.truck", "vehicle.parked", (2.5, 8.0, 3.2), (-15.0, -12.0, 1.6), (0.0, 0.0), 2.8, 0),
    ("animal", "", (0.4, 0.9, 0.6), (5.0, 9.0, 0.3), (0.0, 0.0), 0.0, 5),
)


def token(*parts: object) -> str:
    """A 32-digit token that depends on the parts only."""
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def quaternion(rotation: Rotation) -> list[float]:
    """(w, x, y, z) as nuScenes stores it."""
    x, y, z, w = rotation.as_quat()
    return [float(value) for value in (w, x, y, z)]


@dataclass
class TinyNuScenes:
    """Writer of the data set; `tables` may be edited before `save`."""

    root: Path
    version: str = "v1.0-mini"
    scenes: tuple[str, ...] = SCENES
    tables: dict[str, list[dict]] = field(default_factory=dict)

    def __post_init__(self):
        names = "attribute category calibrated_sensor ego_pose instance log map sample sample_annotation sample_data"
        self.tables = {name: [] for name in (names + " scene sensor visibility").split()}
        self._fixed_tables()
        for scene in self.scenes:
            self._scene(scene)

    def save(self) -> Path:
        """Write the tables and the map; the sensor files are there already."""
        for name, records in self.tables.items():
            path = self.root / self.version / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(records))
        return self.root

    def _add(self, table: str, name: tuple, /, **fields) -> str:
        self.tables[table].append({"token": token(table, *name), **fields})
        return self.tables[table][-1]["token"]

    def _fixed_tables(self):
        for category, attribute, *_ in OBJECTS:
            self._add("category", (category,), name=category, description="")
            if attribute:
                self._add("attribute", (attribute,), name=attribute, description="")
        self._add("visibility", (4,), level="v80-100", description="")
        self.tables["visibility"][0]["token"] = "4"
        logs = [
            self._add("log", (s,), logfile=s, vehicle="v", date_captured="", location="onenorth") for s in self.scenes
        ]
        self._add("map", (0,), log_tokens=logs, category="semantic_prior", filename="maps/map.png")
        (self.root / "maps").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(self.root / "maps/map.png"), np.zeros((4, 4), np.uint8))
        self._calibration("LIDAR_TOP", "lidar", *LIDAR2EGO, [])
        for channel, yaw in zip(CAMERAS, CAMERA_YAW, strict=True):
            rotation = Rotation.from_euler("z", yaw) * Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
            offset = Rotation.from_euler("z", yaw).apply([0.8, 0.0, 1.5])
            intrinsics = [[126.0, 0.0, 80.0], [0.0, 126.0, 45.0], [0.0, 0.0, 1.0]]
            self._calibration(channel, "camera", offset.tolist(), rotation, intrinsics)

    def _calibration(self, channel: str, modality: str, shift: list, rotation: Rotation, intrinsics: list):
        sensor = self._add("sensor", (channel,), channel=channel, modality=modality)
        self._add(
            "calibrated_sensor",
            (channel,),
            sensor_token=sensor,
            translation=list(shift),
            rotation=quaternion(rotation),
            camera_intrinsic=intrinsics,
        )

    def _scene(self, scene: str):
        tokens = [token("sample", scene, frame) for frame in range(KEYFRAMES)]
        self._add(
            "scene",
            (scene,),
            log_token=token("log", scene),
            nbr_samples=KEYFRAMES,
            first_sample_token=tokens[0],
            last_sample_token=tokens[-1],
            name=scene,
            description="",
        )
        base = 1_500_000_000_000_000 + 10**9 * self.scenes.index(scene)
        for frame, sample in enumerate(tokens):
            neighbours = {"prev": tokens[frame - 1] if frame else "", "next": (*tokens, "")[frame + 1]}
            record = {"timestamp": base + frame * 500_000, "scene_token": token("scene", scene)}
            self.tables["sample"].append({"token": sample, **record, **neighbours})
            for channel in CAMERAS:
                name = f"samples/{channel}/{scene}_{frame}.jpg"
                self._reading(name, channel, sample, base, frame * 0.5, True, "", "")
                self._image(name, channel)
        times = np.arange((KEYFRAMES - 1) * (SWEEPS_BETWEEN + 1) + 1) * 0.5 / (SWEEPS_BETWEEN + 1)
        self._lidar(scene, tokens, base, times)
        for number in range(len(OBJECTS)):
            self._annotations(scene, number, tokens)

    def _reading(self, name, channel, sample, base, seconds, is_key, previous, following):
        position = EGO_START + EGO_SPEED * seconds
        pose = self._add(
            "ego_pose",
            (name,),
            timestamp=base + round(seconds * 1e6),
            rotation=quaternion(ego_rotation(seconds)),
            translation=position.tolist(),
        )
        self._add(
            "sample_data",
            (name,),
            sample_token=sample,
            ego_pose_token=pose,
            calibrated_sensor_token=token("calibrated_sensor", channel),
            timestamp=base + round(seconds * 1e6),
            fileformat=name.rpartition(".")[2],
            is_key_frame=is_key,
            height=90,
            width=160,
            filename=name,
            prev=previous and token("sample_data", previous),
            next=following and token("sample_data", following),
        )

    def _lidar(self, scene: str, samples: list[str], base: int, times: np.ndarray):
        names = []
        for index in range(len(times)):
            folder = "sweeps" if index % (SWEEPS_BETWEEN + 1) else "samples"
            names.append(f"{folder}/LIDAR_TOP/{scene}_{index}.pcd.bin")
        for index, (name, seconds) in enumerate(zip(names, times, strict=True)):
            key = index % (SWEEPS_BETWEEN + 1) == 0
            sample = samples[-(-index // (SWEEPS_BETWEEN + 1))]
            chain = (names[index - 1] if index else "", (*names, "")[index + 1])
            self._reading(name, "LIDAR_TOP", sample, base, float(seconds), key, *chain)
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            cloud(float(seconds), index).astype("<f4").tofile(path)

    def _image(self, name: str, channel: str):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((90, 160, 3), 40 * CAMERAS.index(channel), np.uint8))

    def _annotations(self, scene: str, number: int, samples: list[str]):
        category, attribute, size, *_, yaw, points = OBJECTS[number]
        names = [token("sample_annotation", scene, number, frame) for frame in range(KEYFRAMES)]
        instance = self._add(
            "instance",
            (scene, number),
            category_token=token("category", category),
            nbr_annotations=KEYFRAMES,
            first_annotation_token=names[0],
            last_annotation_token=names[-1],
        )
        for frame, sample in enumerate(samples):
            self._add(
                "sample_annotation",
                (scene, number, frame),
                sample_token=sample,
                instance_token=instance,
                visibility_token="4",
                attribute_tokens=[token("attribute", attribute)] if attribute else [],
                translation=object_centre(number, frame * 0.5).tolist(),
                size=list(size),
                rotation=quaternion(Rotation.from_euler("z", yaw)),
                prev=names[frame - 1] if frame else "",
                next=(*names, "")[frame + 1],
                num_lidar_pts=points,
                num_radar_pts=0,
            )


def ego_rotation(seconds: float) -> Rotation:
    """Ego to global at a time of the scene."""
    return Rotation.from_euler("zyx", [0.2 + 0.1 * seconds, 0.01, 0.02])


def object_centre(number: int, seconds: float) -> np.ndarray:
    """Centre of an object in the global frame, metres."""
    start, velocity = OBJECTS[number][3:5]
    return EGO_START + start + np.array([*velocity, 0.0]) * seconds


def global_to_lidar(points: np.ndarray, seconds: float) -> np.ndarray:
    """(N, 3) points of the global frame in the LiDAR's frame at a time."""
    ego = ego_rotation(seconds).inv().apply(points - EGO_START - EGO_SPEED * seconds)
    return LIDAR2EGO[1].inv().apply(ego - LIDAR2EGO[0])


def cloud(seconds: float, seed: int) -> np.ndarray:
    """(N, 5) points in the LiDAR frame: on the objects (inside their boxes), and clutter far above them."""
    rng = np.random.default_rng(seed)
    parts = [rng.uniform([-50, -50, 8], [50, 50, 12], (100, 3))]
    for number, (_, _, (width, length, height), _, _, yaw, count) in enumerate(OBJECTS):
        local = rng.uniform(-0.45, 0.45, (count, 3)) * (length, width, height)
        world = Rotation.from_euler("z", yaw).apply(local) if count else local
        parts.append(global_to_lidar(world + object_centre(number, seconds), seconds))
    points = np.concatenate(parts)
    return np.column_stack([points, rng.uniform(0, 255, len(points)), rng.integers(0, 32, len(points))])
