"""The deployed detector: the exported files, and between them what the runtime's own kernels do."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bevfusion.boxes import lidar_to_legacy
from bevfusion.data import LiDARInstance3DBoxes
from bevfusion.errors import InputError
from bevfusion.models.box_coder import TransFusionBBoxCoder
from bevfusion.models.view_transform import BaseTransform, CameraGeometry
from bevfusion.ops.voxelize import Voxelization
from bevfusion.registry import BBOX_CODERS, MODELS
from lean.export.dump import write_dump
from lean.export.stages import CAMERA, FUSER, HEAD, LIDAR, TRANSFORM, FileStages, ModelStages, Stages

CENTRE = "reg"  # the runtime's name for the head's `center`
MATRICES = ("camera_intrinsics", "camera2lidar", "lidar2image", "img_aug_matrix")  # of the runtime's example data


class Kernels(NamedTuple):
    """What is in no file: voxelisation, camera geometry with pooling, box decoding."""

    voxelize: Voxelization
    transform: BaseTransform
    coder: TransFusionBBoxCoder

    @classmethod
    def of_config(cls, model: Mapping[str, Any]) -> "Kernels":
        """Build them from a config's `model`.

        Raises:
            InputError: it is not one with both sensors.
        """
        encoders = model["encoders"]
        if not encoders.get("camera") or not encoders.get("lidar"):
            raise InputError("the config's model has one sensor; the runtime is for camera and LiDAR together")
        transform, coder = encoders["camera"]["vtransform"], model["heads"]["object"]["bbox_coder"]
        return cls(
            Voxelization(**encoders["lidar"]["voxelize"]).eval(),
            MODELS.build(transform).eval(),
            BBOX_CODERS.build(coder),
        )

    @classmethod
    def of_model(cls, model: nn.Module) -> "Kernels":
        """Copy a model's own to the CPU."""
        parts = (model.encoders["lidar"]["voxelize"], model.encoders["camera"]["vtransform"])
        return cls(*(copy.deepcopy(part).cpu().eval() for part in parts), model.heads["object"].bbox_coder)


class DeployedPipeline:
    """Detects objects in a frame by running the stages one after the other; called like the model.

    As in the runtime no non-maximum suppression follows.

    Args:
        stages: what computes the stages.
        kernels: what comes between them.
        half_points: round the points to FP16, in which the runtime takes them.
    """

    def __init__(self, stages: Stages, kernels: Kernels, half_points: bool = False):
        self.stages, self.half_points = stages, half_points
        self.voxelize, self.transform, self.coder = kernels

    @torch.no_grad()
    def __call__(
        self,
        img: Tensor,
        points: Sequence[Tensor],
        camera_intrinsics: Tensor,
        camera2lidar: Tensor,
        lidar2image: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
        **_,
    ) -> list[dict]:
        """Detect the objects of one frame; arguments and result are those of the model's forward.

        Raises:
            QuantizationError: the frame doesn't fit the files.
        """
        matrices = (camera_intrinsics, camera2lidar, lidar2image, img_aug_matrix, lidar_aug_matrix)
        geometry = CameraGeometry(*(matrix.cpu() for matrix in matrices))
        points = [cloud.cpu().half().float() if self.half_points else cloud.cpu() for cloud in points]
        camera = self.run(TRANSFORM, feat_in=self.pool(img, points, geometry))["feat_out"]
        features, coordinates = self.voxelize(points)
        lidar = self.run(LIDAR, features=features, coordinates=coordinates)["lidar"]
        middle = self.run(FUSER, camera=camera, lidar=lidar)["middle"]
        return [self.decode(self.run(HEAD, middle=middle))]

    def run(self, stage: str, **inputs: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """Run one stage."""
        return self.stages.run(stage, **{name: np.asarray(value) for name, value in inputs.items()})

    def pool(self, img: Tensor, points: Sequence[Tensor], geometry: CameraGeometry) -> np.ndarray:
        """Map images (1, N, 3, H, W) to the pooled camera map (1, C, X, Y), in the type of the files.

        The sums are float32, as in the runtime's kernel.
        """
        inputs = {"img": img.cpu()}
        if hasattr(self.transform, "depth_maps"):
            inputs["depth"] = self.transform.depth_maps(points, geometry)
        seen = self.run(CAMERA, **inputs)
        context, depth = (torch.from_numpy(seen[name]) for name in ("camera_feature", "camera_depth_weights"))
        pooled = self.transform.splat(depth.float(), context.float().permute(0, 3, 1, 2), geometry)
        return pooled.to(context.dtype).numpy()

    def decode(self, raw: Mapping[str, np.ndarray]) -> dict:
        """Turn the head's outputs into boxes, scores and labels."""
        maps = {name: torch.from_numpy(value).float() for name, value in raw.items()}
        scores = maps.pop("score")
        maps["center"] = maps.pop(CENTRE)
        boxes, best, labels = self.coder.decode(scores, maps)[0]
        return {"boxes_3d": LiDARInstance3DBoxes(boxes, boxes.shape[-1]), "scores_3d": best, "labels_3d": labels}


def open_files(
    cfg: Mapping[str, Any], folder: str | Path, integer: bool = True, half_points: bool = False
) -> DeployedPipeline:
    """Put the files of a folder together; `integer` and `half_points` as in `FileStages` and `DeployedPipeline`.

    Raises:
        InputError: the files were exported from another config.
        QuantizationError: a file is missing or can't be executed.
    """
    kernels = Kernels.of_config(cfg["model"])
    pipeline = DeployedPipeline(FileStages(folder, integer), kernels, half_points)
    check_files(cfg["model"], pipeline)
    return pipeline


def in_stages(model: nn.Module) -> DeployedPipeline:
    """Let a model compute stage by stage, to look at what lies between them.

    Raises:
        QuantizationError: it is not one with both sensors.
    """
    return DeployedPipeline(ModelStages(model), Kernels.of_model(model))


def check_files(model: Mapping[str, Any], pipeline: DeployedPipeline) -> None:
    """Refuse files whose shapes are not those of the config's model.

    Raises:
        InputError: names the file, the tensor, and both shapes.
    """
    files, transform, head = pipeline.stages, pipeline.transform, model["heads"]["object"]
    columns, rows, levels = transform.grid
    bins, height, width, _ = transform.frustum.shape
    wanted = {
        (CAMERA, "img"): (1, None, 3, *transform.image_size),
        (CAMERA, "camera_feature"): (None, height, width, transform.context_channels),
        (CAMERA, "camera_depth_weights"): (None, bins, height, width),
        (TRANSFORM, "feat_in"): (1, transform.context_channels * levels, columns, rows),
        (HEAD, "score"): (1, head["num_classes"], head["num_proposals"]),
        (LIDAR, "grid"): tuple(model["encoders"]["lidar"]["backbone"]["sparse_shape"]),
    }
    found = {(stage, name): shape for stage, shapes in files.shapes.items() for name, shape in shapes.items()}
    found[LIDAR, "grid"] = files.grid
    for (stage, name), shape in wanted.items():
        given = found.get((stage, name), ())
        if len(given) != len(shape) or any(b not in (None, a) for a, b in zip(given, shape, strict=True)):
            raise InputError(
                f"{files.folder}/{stage}.onnx was exported from another config: its {name} is "
                f"{_text(given)}, the config's {_text(shape)}"
            )


def _text(shape: Sequence[int | None]) -> str:
    return " x ".join("N" if size is None else str(size) for size in shape) or "absent"


def dump_frame(pipeline: DeployedPipeline, batch: Mapping[str, Any], folder: str | Path) -> None:
    """Run one frame, and write the inputs and outputs of all stages as `.tensor` files.

    They are called `STAGE.TENSOR`. Points (FP16) and matrices have the names of the runtime's example data; `boxes`,
    `scores` and `labels` are what was decoded: boxes (K, 9) in the runtime's convention.

    Raises:
        QuantizationError: the frame doesn't fit the files, or the folder can't be written.
    """
    pipeline.stages.recorded = tensors = {}
    try:
        result = pipeline(**batch)[0]
    finally:
        pipeline.stages.recorded = None
    tensors["points"] = batch["points"][0].half()
    tensors |= {name: batch[name].float() for name in MATRICES}
    tensors["boxes"] = lidar_to_legacy(result["boxes_3d"].tensor)
    tensors |= {"scores": result["scores_3d"], "labels": result["labels_3d"]}
    write_dump(folder, tensors)
