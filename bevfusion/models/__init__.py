"""The BEVFusion float model; importing this package registers its modules."""

from bevfusion import registry  # noqa: F401 - first, since it makes mmdet3d importable
from bevfusion.models import (
    assigner,
    box_coder,
    detector,
    fusers,
    lss_fpn,
    resnet,
    sparse_encoder,
    transfusion,
    view_transform,
)
from bevfusion.models.build import build_model

__all__ = [
    "assigner",
    "box_coder",
    "build_model",
    "detector",
    "fusers",
    "lss_fpn",
    "resnet",
    "sparse_encoder",
    "transfusion",
    "view_transform",
]
