"""nuScenes data: info files, pipelines, data sets and loaders. Importing it registers the types that configs name."""

from bevfusion import registry  # noqa: F401 - first, since it makes mmdet3d importable
from bevfusion.data import pipelines
from bevfusion.data.infos import load_infos
from bevfusion.data.loader import (
    FrameLoader,
    calibration_dataset,
    calibration_frames,
    calibration_loader,
    frames_of,
    to_device,
)
from bevfusion.data.nuscenes import LiDARInstance3DBoxes, NuScenesDataset
from bevfusion.data.pickles import load_pickle
from bevfusion.data.readable import unreadable_frames
from bevfusion.data.wrappers import CBGSDataset, build_dataset

__all__ = [
    "CBGSDataset",
    "FrameLoader",
    "LiDARInstance3DBoxes",
    "NuScenesDataset",
    "build_dataset",
    "calibration_dataset",
    "calibration_frames",
    "calibration_loader",
    "frames_of",
    "load_infos",
    "load_pickle",
    "pipelines",
    "to_device",
    "unreadable_frames",
]
