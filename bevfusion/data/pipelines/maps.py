"""Map segmentation masks from nuScenes' map expansion."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nuscenes.map_expansion.map_api import NuScenesMap

from bevfusion.errors import InputError
from bevfusion.registry import PIPELINES

logger = logging.getLogger(__name__)


@PIPELINES.register_module()
class LoadBEVSegmentation:
    """Draw map layers around the car: `gt_masks_bev` (C, X, Y) int64 of 0 and 1, after the lidar augmentation.

    Only map segmentation heads learn from them. Without maps/expansion under the data root no masks are made, which is
    logged once; `Collect3D` then leaves them out.

    Args:
        dataset_root: folder with maps/.
        xbound, ybound: (start, end, step) of the grid, metres.
        classes: names of layers; "divider" joins road and lane dividers, "drivable_area*" segments and lanes.

    Raises:
        InputError: the map of the frame's location is missing.
    """

    LAYERS: ClassVar = {"drivable_area*": ("road_segment", "lane"), "divider": ("road_divider", "lane_divider")}

    def __init__(self, dataset_root: str, xbound: Sequence[float], ybound: Sequence[float], classes: Sequence[str]):
        self.dataset_root, self.classes = dataset_root, tuple(classes)
        self.patch_size = (ybound[1] - ybound[0], xbound[1] - xbound[0])
        self.canvas_size = (int(self.patch_size[0] / ybound[2]), int(self.patch_size[1] / xbound[2]))
        self.layers = sorted({layer for name in self.classes for layer in self.LAYERS.get(name, (name,))})
        self.maps: dict[str, NuScenesMap] = {}  # loading one takes seconds
        self.available = Path(dataset_root, "maps", "expansion").is_dir()
        if not self.available:
            logger.info("no map expansion in %s/maps/expansion: frames carry no gt_masks_bev", dataset_root)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        if not self.available:
            return data
        lidar2global = data["ego2global"] @ data["lidar2ego"] @ np.linalg.inv(data["lidar_aug_matrix"])
        x, y = lidar2global[:2, 3]
        yaw = np.degrees(np.arctan2(lidar2global[1, 0], lidar2global[0, 0]))
        masks = self._map(data["location"]).get_map_mask((x, y, *self.patch_size), yaw, self.layers, self.canvas_size)
        masks = masks.transpose(0, 2, 1).astype(bool)
        labels = np.zeros((len(self.classes), *masks.shape[1:]), dtype=np.int64)
        for label, name in zip(labels, self.classes, strict=True):
            for layer in self.LAYERS.get(name, (name,)):
                label[masks[self.layers.index(layer)]] = 1
        data["gt_masks_bev"] = labels
        return data

    def _map(self, location: str | None) -> NuScenesMap:
        if location is None:
            raise InputError("the info file gives no 'location', which map masks need; take LoadBEVSegmentation out")
        if location not in self.maps:
            path = Path(self.dataset_root, "maps", "expansion", f"{location}.json")
            if not path.is_file():
                raise InputError(f"map {path} does not exist; extract nuScenes' map expansion pack completely")
            self.maps[location] = NuScenesMap(self.dataset_root, location)
        return self.maps[location]
