"""Transforms of frames, registered under the names that the configs use; the rest comes from mmdet3d."""

from bevfusion.data.pipelines.augment import GlobalRotScaleTrans, ObjectRangeFilter, RandomFlip3D
from bevfusion.data.pipelines.compose import Compose
from bevfusion.data.pipelines.depth import GTDepth
from bevfusion.data.pipelines.formatting import Collect3D, DefaultFormatBundle3D
from bevfusion.data.pipelines.images import GridMask, ImageAug3D, ImageNormalize, LoadMultiViewImageFromFiles
from bevfusion.data.pipelines.maps import LoadBEVSegmentation
from bevfusion.data.pipelines.paste import ObjectPaste
from bevfusion.data.pipelines.points import LoadPointsFromFile, LoadPointsFromMultiSweeps

__all__ = [
    "Collect3D",
    "Compose",
    "DefaultFormatBundle3D",
    "GTDepth",
    "GlobalRotScaleTrans",
    "GridMask",
    "ImageAug3D",
    "ImageNormalize",
    "LoadBEVSegmentation",
    "LoadMultiViewImageFromFiles",
    "LoadPointsFromFile",
    "LoadPointsFromMultiSweeps",
    "ObjectPaste",
    "ObjectRangeFilter",
    "RandomFlip3D",
]
