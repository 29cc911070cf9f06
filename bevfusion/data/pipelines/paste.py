"""Copy-paste augmentation: objects cut out of other frames are put into this one (https://arxiv.org/abs/1903.01864)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.ops import points_in_boxes_cpu
from mmdet3d.core.bbox import LiDARInstance3DBoxes
from mmdet3d.core.points import LiDARPoints

from bevfusion.boxes import legacy_to_lidar
from bevfusion.data.entry import Entry
from bevfusion.data.pickles import load_pickle
from bevfusion.errors import InputError
from bevfusion.registry import PIPELINES


class MissingDatabaseError(InputError):
    """The ground-truth database that a pipeline names is not there."""


@dataclass(frozen=True, slots=True)
class _Objects:
    """The K objects of one class."""

    paths: list[str]  # of their points, relative to `centres`
    centres: np.ndarray  # (K, 3) float32, as stored
    boxes: torch.Tensor  # (K, 9) float32, mmdet3d 1.0 convention


class DataBaseSampler:
    """Objects of a ground-truth database, drawn so that they overlap neither each other nor the boxes of a frame.

    Unlike the original, which goes through a shuffled list, every draw is independent of the draws before it: what a
    frame gets depends on the state of the random generators only.

    Args:
        info_path: nuscenes_dbinfos_train.pkl in the original layout: class -> list of objects with `path`,
            `box3d_lidar` (legacy convention), `num_points_in_gt` and `difficulty`.
        dataset_root: folder that `path` is relative to.
        rate: share of the wanted objects that is really drawn.
        prepare: filters: `filter_by_difficulty` lists the difficulties left out, `filter_by_min_points` gives the least
            number of points by class.
        sample_groups: how many objects of a class a frame should have in the end.
        classes: class names; their order gives the labels.
        points_loader: config of the transform that reads `path`.

    Raises:
        MissingDatabaseError: there is no file `info_path`.
        InputError: the file is not such a database, or a filter is unknown.
    """

    def __init__(
        self,
        info_path: str,
        dataset_root: str,
        rate: float,
        prepare: Mapping[str, Any],
        sample_groups: Mapping[str, int],
        classes: Sequence[str],
        points_loader: Mapping[str, Any],
    ):
        check_database(info_path)
        unknown = set(prepare) - {"filter_by_difficulty", "filter_by_min_points"}
        if unknown:
            raise InputError(f"ObjectPaste: unknown filter {', '.join(sorted(unknown))} in 'prepare'")
        self.dataset_root, self.rate, self.sample_groups = dataset_root, rate, dict(sample_groups)
        self.labels = {name: label for label, name in enumerate(classes)}
        self.load_points = PIPELINES.build(points_loader)
        database = Entry(load_pickle(info_path), info_path)
        skipped = prepare.get("filter_by_difficulty", ())
        least = prepare.get("filter_by_min_points", {})
        self.objects = {name: _read_objects(database, name, skipped, least.get(name, 0)) for name in self.sample_groups}

    def sample(self, boxes: torch.Tensor, labels: np.ndarray) -> tuple[torch.Tensor, np.ndarray, torch.Tensor] | None:
        """Objects for a frame with `boxes` (M, 9) and `labels` (M,): boxes (K, 9), labels (K,), points (P, C), or None.

        Raises:
            InputError: the points of an object can't be read.
        """
        taken, points, new_labels = boxes, [], []
        for name, wanted in self.sample_groups.items():
            label = self.labels[name]
            missing = round(self.rate * (wanted - int((labels == label).sum())))
            for i in self._choose(name, missing, taken):
                taken = torch.cat([taken, self.objects[name].boxes[i : i + 1, : boxes.shape[1]]])
                points.append(self._points(self.objects[name], i))
                new_labels.append(label)
        if not points:
            return None
        return taken[len(boxes) :], np.array(new_labels, dtype=np.int64), torch.cat(points)

    def _choose(self, name: str, count: int, taken: torch.Tensor) -> list[int]:
        """Indices of at most `count` objects that keep clear of the boxes `taken` and of each other."""
        objects = self.objects[name]
        if count <= 0 or not objects.paths:
            return []
        drawn = random.sample(range(len(objects.paths)), min(count, len(objects.paths)))
        corners = bev_corners(torch.cat([taken, objects.boxes[drawn, : taken.shape[1]]]))
        collide = overlaps(corners)
        np.fill_diagonal(collide, False)
        chosen = []
        for row, index in enumerate(drawn, start=len(taken)):
            if collide[row].any():
                collide[:, row] = False  # it is left out: nothing collides with it any more
            else:
                chosen.append(index)
        return chosen

    def _points(self, objects: _Objects, index: int) -> torch.Tensor:
        path = str(Path(self.dataset_root, objects.paths[index]))
        points = self.load_points({"lidar_path": path})["points"]
        points.translate(objects.centres[index])
        return points.tensor


def check_database(info_path: str) -> None:
    """Raise MissingDatabaseError, with what to do, unless there is a ground-truth database `info_path`."""
    if not Path(info_path).is_file():
        raise MissingDatabaseError(
            f"the ground-truth database {info_path} does not exist; write it with "
            f"`python -m bevfusion.create_data --root {Path(info_path).parent} --version v1.0-trainval` (or v1.0-mini)"
        )


def _read_objects(database: Entry, name: str, skipped: Sequence[int], least_points: int) -> _Objects:
    kept = [
        entry
        for entry in (database.entries(name) if name in database else [])
        if entry["difficulty"] not in skipped and entry["num_points_in_gt"] >= least_points
    ]
    stored = np.zeros((len(kept), 9), dtype=np.float32)
    for row, entry in zip(stored, kept, strict=True):
        box = entry.array("box3d_lidar", -1)
        if box.size not in (7, 9):
            raise InputError(f"{entry.where}: 'box3d_lidar' should have 7 or 9 numbers, not {box.size}")
        row[: box.size] = np.nan_to_num(box)
    boxes = LiDARInstance3DBoxes(legacy_to_lidar(stored), box_dim=9, origin=(0.5, 0.5, 0.5)).tensor
    return _Objects([entry.text("path") for entry in kept], stored[:, :3], boxes)


def bev_corners(boxes: torch.Tensor) -> np.ndarray:
    """(N, 4, 2) corners in the ground plane of boxes (N, >=7), in order around the box."""
    values = boxes.double().numpy()
    half = values[:, None, 3:5] / 2 * [[-1, -1], [-1, 1], [1, 1], [1, -1]]
    cos, sin = np.cos(values[:, 6]), np.sin(values[:, 6])
    rotation = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)  # acts on rows
    return half @ rotation + values[:, None, :2]


def overlaps(corners: np.ndarray) -> np.ndarray:
    """(N, N) bool: which of the rectangles (N, 4, 2) overlap, by the separating axis theorem."""
    edges = corners[:, 1:3] - corners[:, :2]  # two directions a rectangle
    # along every direction of rectangle i: the interval that rectangle j covers
    projected = np.einsum("iad,jkd->ijak", edges, corners)
    low, high = projected.min(axis=3), projected.max(axis=3)
    own_low, own_high = (np.einsum("iia->ia", bound)[:, None] for bound in (low, high))
    apart = ((low >= own_high) | (high <= own_low)).any(axis=2)
    return ~(apart | apart.T)


@PIPELINES.register_module()
class ObjectPaste:
    """Paste objects of a ground-truth database into the frame: points, boxes and labels.

    Points of the frame inside a pasted box are removed. (The original looks for them half a box too high, because it
    takes the stored gravity centre for the bottom.)

    Args:
        db_sampler: arguments of `DataBaseSampler`.
        stop_epoch: from this epoch on nothing is pasted. Before the first epoch the epoch is -1, so that -1 means
            never; the database has to exist even then, but is not loaded.

    Raises:
        MissingDatabaseError: the database does not exist.
        InputError: it can't be used.
    """

    def __init__(self, db_sampler: Mapping[str, Any], stop_epoch: int | None = None):
        self.epoch, self.stop_epoch = -1, stop_epoch
        arguments = {key: value for key, value in db_sampler.items() if key != "type"}
        check_database(arguments["info_path"])
        self.sampler = DataBaseSampler(**arguments) if self._active() else None

    def _active(self) -> bool:
        return self.stop_epoch is None or self.epoch < self.stop_epoch

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, which may end the pasting."""
        self.epoch = epoch

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        if self.sampler is None or not self._active():
            return data
        boxes = data["gt_bboxes_3d"]
        sampled = self.sampler.sample(boxes.tensor, data["gt_labels_3d"])
        if sampled is None:
            return data
        new_boxes, labels, new_points = sampled
        points = data["points"].tensor
        covered = points_in_boxes_cpu(points[None, :, :3].contiguous(), new_boxes[None, :, :7].contiguous())[0].any(
            dim=1
        )
        points = torch.cat([new_points[:, : points.shape[1]], points[~covered]])
        data["points"] = LiDARPoints(points, points_dim=points.shape[1])
        data["gt_bboxes_3d"] = boxes.new_box(torch.cat([boxes.tensor, new_boxes]))
        data["gt_labels_3d"] = np.concatenate([data["gt_labels_3d"], labels])
        return data
