"""Child registries of mmdet3d's: a type name finds our class first, then mmdet3d's, mmdet's and mmcv's.

Importing this module adds children to their registries and nothing else.
"""

# ruff: noqa: E402
import difflib
from collections.abc import Mapping
from functools import partial

from bevfusion.compat import import_mmdet3d

import_mmdet3d()  # before anything else does

import mmdet3d.core
import mmdet3d.models  # noqa: F401
from mmcv.cnn import MODELS as MMCV_MODELS
from mmcv.utils import Registry, build_from_cfg
from mmdet.core.bbox.builder import BBOX_ASSIGNERS as MMDET_BBOX_ASSIGNERS
from mmdet.core.bbox.builder import BBOX_CODERS as MMDET_BBOX_CODERS
from mmdet.core.bbox.iou_calculators.builder import IOU_CALCULATORS
from mmdet.core.bbox.match_costs.builder import MATCH_COST as MMDET_MATCH_COSTS
from mmdet.datasets.builder import DATASETS as MMDET_DATASETS
from mmdet.datasets.builder import PIPELINES as MMDET_PIPELINES
from mmdet.models.builder import MODELS as MMDET_MODELS
from mmdet3d.datasets.builder import DATASETS as MMDET3D_DATASETS
from mmdet3d.datasets.builder import PIPELINES as MMDET3D_PIPELINES
from mmdet3d.models.builder import MODELS as MMDET3D_MODELS

from bevfusion.errors import InputError


def build_first(cfg: Mapping, registry: Registry, default_args: Mapping | None = None, *, elders: tuple = ()):
    """Build `cfg` from the first of (`registry`, \\*`elders`) that knows its ``type``.

    Raises:
        InputError: no registry knows the type (the message names the nearest known ones), or its arguments don't fit.
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise InputError(f"a {registry.name} config needs a 'type' key, got {cfg!r}")
    chain = (registry, *elders)
    for candidate in chain:
        if cfg["type"] in candidate.module_dict:
            try:
                return build_from_cfg(cfg, candidate, default_args)
            except TypeError as error:
                raise InputError(f"the config of {registry.name} {cfg['type']!r} doesn't fit: {error}") from error
    known = {name for candidate in chain for name in candidate.module_dict}
    near = ", ".join(difflib.get_close_matches(str(cfg["type"]), known, 3)) or "none"
    raise InputError(f"unknown {registry.name} type {cfg['type']!r} in the config; nearest: {near}")


def _child(name: str, *elders: Registry) -> Registry:
    return Registry(name, parent=elders[0], scope="bevfusion", build_func=partial(build_first, elders=elders))


MODELS = _child("model", MMDET3D_MODELS, MMDET_MODELS, MMCV_MODELS)
DATASETS = _child("dataset", MMDET3D_DATASETS, MMDET_DATASETS)
PIPELINES = _child("pipeline", MMDET3D_PIPELINES, MMDET_PIPELINES)
BBOX_CODERS = _child("bbox coder", MMDET_BBOX_CODERS)
BBOX_ASSIGNERS = _child("bbox assigner", MMDET_BBOX_ASSIGNERS)
MATCH_COSTS = _child("match cost", MMDET_MATCH_COSTS)

__all__ = ["BBOX_ASSIGNERS", "BBOX_CODERS", "DATASETS", "IOU_CALCULATORS", "MATCH_COSTS", "MODELS", "PIPELINES"]
