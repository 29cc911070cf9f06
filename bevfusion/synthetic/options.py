"""What a synthetic world consists of: the options, their limits, and the names and times that follow from them."""

import ast
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from bevfusion.errors import InputError
from bevfusion.synthetic.rig import CAMERAS, LIDAR, NATIVE_SIZE

KEYFRAME_PERIOD, SWEEP_PERIOD, CAMERA_PERIOD = 0.5, 0.05, 1 / 12  # seconds, as in nuScenes
MAX_FRAMES, MAX_SWEEPS, MAX_CAMERA_SWEEPS = 40, 9, 5
EPOCH = 1_714_557_600  # seconds: 2024-05-01 10:00:00 UTC
SCENE_SPACING = 600  # seconds between the starts of scenes with consecutive numbers


@dataclass(frozen=True)
class Shot:
    """A file of sensor data: `time` in seconds since the first keyframe, `timestamp` in microseconds, relative path."""

    channel: str
    time: float
    timestamp: int
    is_key_frame: bool
    filename: str


@dataclass(frozen=True)
class Options:
    """All that decides the bytes of a world."""

    version: str
    scenes: int
    val_scenes: int
    frames: int
    image_size: tuple[int, int]
    seed: int
    sweeps: int
    camera_sweeps: int
    sweep_motion: bool

    def __post_init__(self) -> None:
        names = split_names(self.version)
        limits = {
            "--scenes": (self.scenes, 0, len(names[0])),
            "--val-scenes": (self.val_scenes, 0, len(names[1])),
            "--frames": (self.frames, 1, MAX_FRAMES),
            "--image-size (width)": (self.image_size[0], 32, NATIVE_SIZE[0]),
            "--image-size (height)": (self.image_size[1], 32, NATIVE_SIZE[1]),
            "--seed": (self.seed, 0, 2**32 - 1),
            "--sweeps": (self.sweeps, 0, MAX_SWEEPS),
            "--camera-sweeps": (self.camera_sweeps, 0, MAX_CAMERA_SWEEPS),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise InputError(f"{name} is {value}: with {self.version} it must be from {low} to {high}")
        if self.scenes + self.val_scenes == 0:
            raise InputError("--scenes and --val-scenes are both 0: ask for at least one scene")

    @property
    def duration(self) -> float:
        """Seconds from the first to the last keyframe of a scene."""
        return (self.frames - 1) * KEYFRAME_PERIOD

    def scene_names(self) -> list[str]:
        """Names of the scenes, those for training first."""
        train, val = split_names(self.version)
        return train[: self.scenes] + val[: self.val_scenes]

    def manifest(self, generator: str) -> dict:
        """A JSON object that tells worlds apart."""
        return {"generator": generator, **asdict(self), "image_size": list(self.image_size)}

    def shots(self, name: str, keyframe: int) -> list[Shot]:
        """The files of one keyframe and of the sweeps that lead up to it, earlier ones first."""
        at = keyframe * KEYFRAME_PERIOD
        plan = [(LIDAR, at - j * SWEEP_PERIOD, j == 0, "pcd.bin") for j in range(self.sweeps + 1)]
        for camera in CAMERAS:
            times = [at + camera.delay - j * CAMERA_PERIOD for j in range(self.camera_sweeps + 1)]
            plan += [(camera, t, j == 0, "jpg") for j, t in enumerate(times)]
        shots = []
        for sensor, t, is_key, suffix in sorted(plan, key=lambda row: (row[1], row[0].channel)):
            timestamp = start_of(name) * 1_000_000 + round(t * 1e6)
            folder = f"{'samples' if is_key else 'sweeps'}/{sensor.channel}"
            file = f"{folder}/{log_name(name)}__{sensor.channel}__{timestamp}.{suffix}"
            shots.append(Shot(sensor.channel, t, timestamp, is_key, file))
        return shots


def split_names(version: str) -> tuple[list[str], list[str]]:
    """Scene names for training and for validation: the devkit's own splits of that version."""
    lists = _devkit_lists()
    train = sorted({*lists["train_detect"], *lists["train_track"]})
    known = {"v1.0-mini": (lists["mini_train"], lists["mini_val"]), "v1.0-trainval": (train, lists["val"])}
    if version not in known:
        raise InputError(f"--version is {version!r}: it must be one of {', '.join(known)}")
    return known[version]


@lru_cache(maxsize=1)
def _devkit_lists() -> dict[str, list[str]]:
    """The lists of scene names in the devkit's source by name, not imported: that takes seconds."""
    (devkit,) = find_spec("nuscenes").submodule_search_locations
    body = ast.parse(Path(devkit, "utils", "splits.py").read_text()).body
    lists = (node for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.List))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in lists}


def start_of(name: str) -> int:
    """Time of a scene's first keyframe, in seconds since 1970."""
    return EPOCH + int(name.rpartition("-")[2]) * SCENE_SPACING


def log_name(name: str) -> str:
    """Name of the log that a scene belongs to, in nuScenes' fashion."""
    return f"n900-{datetime.fromtimestamp(start_of(name), UTC):%Y-%m-%d-%H-%M-%S}+0000"
