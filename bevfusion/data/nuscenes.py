"""nuScenes keyframes through a pipeline of transforms, as the configs name them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mmdet3d.core.bbox import LiDARInstance3DBoxes, get_box_type
from torch.utils.data import Dataset

from bevfusion.data.infos import load_infos
from bevfusion.data.paths import find_file
from bevfusion.data.pipelines.compose import Compose
from bevfusion.data.records import Frame
from bevfusion.errors import InputError, explaining
from bevfusion.registry import DATASETS

LIDAR = "LIDAR_TOP"
REPLACEMENTS = 100  # frames drawn in place of one without objects before giving up


@DATASETS.register_module()
class NuScenesDataset(Dataset):
    """Keyframes of nuScenes.

    Args:
        ann_file: info file, see `bevfusion.data.infos`.
        pipeline: configs of the transforms, applied in this order.
        dataset_root: folder with samples/ and sweeps/.
        object_classes: names of the classes; their order gives the labels. Boxes of other classes get label -1.
        map_classes: names of the map layers (for map segmentation only).
        load_interval: keep every n-th frame.
        with_velocity: whether boxes are (N, 9) with a velocity or (N, 7).
        modality: `use_camera` says whether camera matrices and image paths are given to the pipeline.
        box_type_3d: only "LiDAR".
        filter_empty_gt: in training, replace a frame without objects by a random other one.
        test_mode: no replacement, and nothing is drawn at random where a transform can avoid it.
        use_valid_flag: keep boxes that LiDAR or radar saw, instead of those with at least one LiDAR point.

    Raises:
        InputError: the info file or the pipeline can't be used.
    """

    def __init__(
        self,
        ann_file: str,
        pipeline: Sequence[Mapping] = (),
        dataset_root: str | None = None,
        object_classes: Sequence[str] = (),
        map_classes: Sequence[str] = (),
        load_interval: int = 1,
        with_velocity: bool = True,
        modality: Mapping[str, bool] | None = None,
        box_type_3d: str = "LiDAR",
        filter_empty_gt: bool = True,
        test_mode: bool = False,
        use_valid_flag: bool = False,
    ):
        if box_type_3d != "LiDAR":
            raise InputError(f"NuScenesDataset: box_type_3d {box_type_3d!r} is not supported, only 'LiDAR'")
        self.box_type_3d, self.box_mode_3d = get_box_type(box_type_3d)
        self.ann_file, self.dataset_root = ann_file, dataset_root or "."
        self.CLASSES, self.map_classes = tuple(object_classes), tuple(map_classes)
        self.cat2id = {name: label for label, name in enumerate(self.CLASSES)}
        self.modality = dict(modality or {"use_lidar": True, "use_camera": True})
        self.with_velocity, self.use_valid_flag = with_velocity, use_valid_flag
        self.filter_empty_gt, self.test_mode = filter_empty_gt, test_mode
        frames, self.metadata = load_infos(ann_file)
        self.data_infos: list[Frame] = frames[::load_interval]
        self.version = self.metadata.get("version")
        self.pipeline = Compose(pipeline)
        self.flag = np.zeros(len(self), dtype=np.uint8)  # one group: mmdet's samplers batch frames of equal flag

    def __len__(self) -> int:
        return len(self.data_infos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The frame through the pipeline; in training, another one if it holds no objects.

        Raises:
            InputError: a file of the frame is missing or damaged; names the frame.
        """
        if self.test_mode or not self.filter_empty_gt:
            return self.prepare(index)
        for _ in range(REPLACEMENTS):
            data = self.prepare(index)
            if "gt_labels_3d" not in data or (data["gt_labels_3d"].data != -1).any():
                return data
            index = np.random.randint(len(self))
        raise InputError(f"{self.ann_file}: {REPLACEMENTS} frames in a row hold no object of {', '.join(self.CLASSES)}")

    def prepare(self, index: int) -> dict[str, Any]:
        """This very frame through the pipeline, whether it holds objects or not.

        Raises:
            InputError: a file of the frame is missing or damaged; names the frame.
        """
        with self.naming(index):
            return self.pipeline(self.get_data_info(index))

    @contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Turn whatever goes wrong with a frame in a `with` block into an InputError that names it."""
        try:
            with explaining("it can't be prepared", f"check its entry in {self.ann_file} and the config's pipeline"):
                yield
        except InputError as error:
            raise InputError(f"frame {self.data_infos[index].token}: {error}") from error

    def set_epoch(self, epoch: int) -> None:
        """Tell the transforms that change their mind during training."""
        for transform in self.pipeline.transforms:
            if hasattr(transform, "set_epoch"):
                transform.set_epoch(epoch)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """What the pipeline starts from: paths, matrices (4x4 float32, column vectors) and annotations.

        Camera matrices are (N, 4, 4): `camera_intrinsics`, `camera2ego`, `camera2lidar`, `lidar2camera`, `lidar2image`.

        Raises:
            InputError: a file is missing.
        """
        frame = self.data_infos[index]
        data = {
            "token": frame.token,
            "sample_idx": frame.token,
            "timestamp": frame.timestamp,
            "location": frame.location,
            "lidar_path": find_file(frame.lidar_path, self.dataset_root, LIDAR),
            "sweeps": self._sweeps(frame),
            "ego2global": frame.ego2global.astype(np.float32),
            "lidar2ego": frame.lidar2ego.astype(np.float32),
            "ann_info": self.get_ann_info(index),
            "box_type_3d": self.box_type_3d,
            "box_mode_3d": self.box_mode_3d,
            "bbox3d_fields": [],
            "test_mode": self.test_mode,
        }
        if self.modality.get("use_camera"):
            data |= self._cameras(frame)
        return data

    def _sweeps(self, frame: Frame) -> list[dict[str, Any]]:
        sweeps = frame.sweeps
        return [
            {
                "data_path": find_file(path, self.dataset_root, LIDAR),
                "timestamp": time,
                "sensor2lidar_rotation": pose[:3, :3],
                "sensor2lidar_translation": pose[:3, 3],
            }
            for path, time, pose in zip(sweeps.paths, sweeps.timestamps, sweeps.sweep2lidar, strict=True)
        ]

    def _cameras(self, frame: Frame) -> dict[str, Any]:
        cameras = frame.cameras
        intrinsics = np.tile(np.eye(4, dtype=np.float32), (len(cameras.names), 1, 1))
        intrinsics[:, :3, :3] = cameras.intrinsics
        lidar2camera = np.linalg.inv(cameras.camera2lidar).astype(np.float32)
        named = zip(cameras.names, cameras.paths, strict=True)
        return {
            "image_paths": [find_file(path, self.dataset_root, name) for name, path in named],
            "camera_intrinsics": intrinsics,
            "camera2ego": cameras.camera2ego.astype(np.float32),
            "camera2lidar": cameras.camera2lidar.astype(np.float32),
            "lidar2camera": lidar2camera,
            "lidar2image": intrinsics @ lidar2camera,
        }

    def get_ann_info(self, index: int) -> dict[str, Any]:
        """Boxes of a frame: `gt_bboxes_3d`, `gt_labels_3d` (N,) int64, `gt_names` (N,); none in a test split."""
        truth = self.data_infos[index].ground_truth
        columns = 9 if self.with_velocity else 7
        if truth is None:
            boxes, names = np.empty((0, columns)), np.empty(0, dtype=np.str_)
        else:
            kept = self._kept(index)
            boxes, names = truth.boxes[kept, :columns], truth.names[kept]
            boxes[np.isnan(boxes).any(axis=1), 7:] = 0
        return {
            "gt_bboxes_3d": LiDARInstance3DBoxes(boxes, box_dim=columns),
            "gt_labels_3d": np.array([self.cat2id.get(name, -1) for name in names], dtype=np.int64),
            "gt_names": names,
        }

    def get_cat_ids(self, index: int) -> list[int]:
        """Labels of the classes that a frame holds, each once (what `CBGSDataset` balances)."""
        truth = self.data_infos[index].ground_truth
        if truth is None:
            return []
        names = truth.names[truth.valid] if self.use_valid_flag else truth.names
        return [self.cat2id[name] for name in np.unique(names) if name in self.cat2id]

    def _kept(self, index: int) -> np.ndarray:
        truth = self.data_infos[index].ground_truth
        return truth.valid if self.use_valid_flag else truth.lidar_points > 0
