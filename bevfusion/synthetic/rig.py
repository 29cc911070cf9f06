"""The sensor rig of nuScenes: six cameras and a LiDAR, with calibration and timing of one of its logs.

The numbers are those of log n015-2018-07-24-11-22-45+0800 of nuScenes v1.0. Frames: ego x forward, y left, z up, origin
on the ground under the rear axle; LiDAR x right, y forward, z up; camera x right, y down, z forward.
"""

from dataclasses import dataclass, field

import numpy as np

NATIVE_SIZE = (1600, 900)


@dataclass(frozen=True)
class Sensor:
    """A sensor: pose in the ego frame (metres; quaternion w, x, y, z) and, for cameras, focal length and centre.

    `intrinsic` is (focal, cx, cy) in pixels of the native size; `delay` the seconds from the LiDAR's timestamp of a
    keyframe to this sensor's.
    """

    channel: str
    translation: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    intrinsic: tuple[float, float, float] | None = None
    delay: float = 0.0

    def matrix(self, size: tuple[int, int]) -> np.ndarray:
        """Camera matrix (3, 3) for images of `size` (width, height); pixel (i, j) covers [i, i+1) x [j, j+1)."""
        focal, cx, cy = self.intrinsic
        sx, sy = size[0] / NATIVE_SIZE[0], size[1] / NATIVE_SIZE[1]
        return np.array([[focal * sx, 0.0, cx * sx], [0.0, focal * sy, cy * sy], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Pose:
    """Where a sensor is in the coordinates of a view: rotation (3, 3) sensor to view, position (3,) in metres.

    `velocity` (3,) in m/s and `yaw_rate` in rad/s are those during a scan; zero where time stands still.
    """

    rotation: np.ndarray
    position: np.ndarray
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(3))
    yaw_rate: float = 0.0


LIDAR = Sensor(
    "LIDAR_TOP",
    (0.9437130093574524, 0.0, 1.8402299880981445),
    (0.7077955119164311, -0.006492241857679724, 0.010646214602139572, -0.7063073142912114),
)
CAMERAS = (
    Sensor(
        "CAM_FRONT",
        (1.7007912397384644, 0.01594563201069832, 1.5109575986862183),
        (0.4998015430554757, -0.5030316162514281, 0.49977981144115063, -0.49737083819489186),
        (1266.417203046554, 816.2670197447984, 491.50706579294757),
        -0.035491,
    ),
    Sensor(
        "CAM_FRONT_RIGHT",
        (1.5508477687835693, -0.4934048056602478, 1.4957480430603027),
        (0.20603479288882026, -0.2026940539967367, 0.6824507837225664, -0.6713610894221409),
        (1260.8474446004698, 807.968244525554, 495.3344268742088),
        -0.027612,
    ),
    Sensor(
        "CAM_BACK_RIGHT",
        (1.0148781538009644, -0.4805682301521301, 1.562395453453064),
        (0.1228098001739398, -0.13240084180727205, -0.7004305823327249, 0.6904960314172721),
        (1259.5137405846733, 807.2529053838625, 501.19579884916527),
        -0.020058,
    ),
    Sensor(
        "CAM_BACK",
        (0.02832603082060814, 0.0034513676073402166, 1.5791034698486328),
        (0.5037872665570174, -0.49740249800119984, -0.49418502247407914, 0.5045496096514881),
        (809.2209905677063, 829.2196003259838, 481.77842384512485),
        -0.010426,
    ),
    Sensor(
        "CAM_BACK_LEFT",
        (1.0356910228729248, 0.4847950339317322, 1.5909701585769653),
        (0.6924185586059355, -0.703161941817813, -0.11648343028801035, 0.11203318144826217),
        (1256.7414812095406, 792.1125740759628, 492.7757465151356),
        -0.000528,
    ),
    Sensor(
        "CAM_FRONT_LEFT",
        (1.5238779783248901, 0.4946313500404358, 1.5093282461166382),
        (0.6757265040490898, -0.6736266528015485, 0.21214014860685007, -0.21122826920192475),
        (1272.5979470598488, 826.6154927353808, 479.75165386361925),
        -0.043107,
    ),
)
SENSORS = (*CAMERAS, LIDAR)


def rotation_matrix(quaternion: tuple[float, float, float, float] | np.ndarray) -> np.ndarray:
    """Rotation (3, 3) of a quaternion (w, x, y, z)."""
    w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> tuple[float, float, float, float]:
    """Quaternion (w, x, y, z) of a turn by `roll` about x, then `pitch` about y, then `yaw` about z (radians)."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a / 2), np.sin(a / 2)) for a in (yaw, pitch, roll))
    q = (
        cr * cp * cy + sr * sp * sy,
        sr * cp * cy - cr * sp * sy,
        cr * sp * cy + sr * cp * sy,
        cr * cp * sy - sr * sp * cy,
    )
    return tuple(float(v) for v in q)
