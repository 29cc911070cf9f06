"""BEVFusion: camera and LiDAR encoders, fused in bird's-eye view, decoded, with task heads."""

from collections.abc import Mapping, Sequence

import torch
from mmcv.runner import BaseModule, auto_fp16, force_fp32
from mmdet3d.core.bbox import LiDARInstance3DBoxes
from torch import Tensor, nn

from bevfusion.errors import InputError
from bevfusion.models.view_transform import CameraGeometry
from bevfusion.ops.voxelize import Voxelization
from bevfusion.registry import MODELS


def _camera_encoder(config: Mapping) -> nn.ModuleDict:
    return nn.ModuleDict({part: MODELS.build(config[part]) for part in ("backbone", "neck", "vtransform")})


def _lidar_encoder(config: Mapping) -> nn.ModuleDict:
    if not config.get("voxelize_reduce", True):
        raise InputError("model.encoders.lidar.voxelize_reduce: false is not supported, the voxel mean is always taken")
    return nn.ModuleDict({"voxelize": Voxelization(**config["voxelize"]), "backbone": MODELS.build(config["backbone"])})


@MODELS.register_module()
class BEVFusion(BaseModule):
    """Multi-sensor 3D detector (Liu et al., 2022).

    Args:
        encoders: configs of `camera` (backbone, neck, vtransform) and `lidar` (voxelize, backbone), either or both.
        fuser: config of the fusion of the sensors' BEV maps; None with one sensor.
        decoder: configs of backbone and neck over the fused map.
        heads: name -> config; only `object` is supported.
        loss_scale: name -> factor on that head's losses.
    """

    def __init__(
        self,
        encoders: Mapping,
        fuser: Mapping | None,
        decoder: Mapping,
        heads: Mapping,
        loss_scale: Mapping[str, float] | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        makers = {"camera": _camera_encoder, "lidar": _lidar_encoder}
        present = {name: config for name, config in encoders.items() if config is not None}
        if not present or set(present) - set(makers):
            raise InputError(f"model.encoders must hold camera, lidar or both, got {sorted(present)}")
        if (fuser is None) != (len(present) == 1):
            raise InputError(f"model.fuser must be given for two sensors and null for one, got {len(present)} sensors")
        self.encoders = nn.ModuleDict({name: makers[name](config) for name, config in present.items()})
        self.fuser = None if fuser is None else MODELS.build(fuser)
        self.decoder = nn.ModuleDict({part: MODELS.build(decoder[part]) for part in ("backbone", "neck")})
        heads = {name: config for name, config in heads.items() if config is not None}
        if set(heads) != {"object"}:
            raise InputError(f"model.heads must hold 'object' alone, got {sorted(heads)}")
        self.heads = nn.ModuleDict({name: MODELS.build(config) for name, config in heads.items()})
        self.loss_scale = {"object": 1.0, **(loss_scale or {})}
        self.fp16_enabled = False

    def extract_camera_features(self, img: Tensor, points: Sequence[Tensor], geometry: CameraGeometry) -> Tensor:
        """Map images (B, N, 3, H, W) to a BEV map (B, C, X, Y)."""
        camera = self.encoders["camera"]
        features = camera["neck"](camera["backbone"](img.flatten(0, 1)))
        finest = features if isinstance(features, Tensor) else features[0]
        return camera["vtransform"](finest.unflatten(0, img.shape[:2]), points, geometry)

    @force_fp32()
    def voxelize(self, points: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Voxelise a batch, see `Voxelization.forward`."""
        return self.encoders["lidar"]["voxelize"](points)

    def extract_lidar_features(self, points: Sequence[Tensor]) -> Tensor:
        """Map point clouds, a list of (P_i, C), to a BEV map (B, C', X, Y)."""
        features, coordinates = self.voxelize(points)
        return self.encoders["lidar"]["backbone"](features, coordinates, len(points))

    @auto_fp16(apply_to=("img",))
    def extract_features(self, img: Tensor | None, points: Sequence[Tensor], geometry: CameraGeometry | None) -> Tensor:
        """Fuse the sensors' BEV maps and decode them: (B, C, X, Y)."""
        extract = {
            "camera": lambda: self.extract_camera_features(img, points, geometry),
            "lidar": lambda: self.extract_lidar_features(points),
        }
        maps = [extract[name]() for name in self.encoders]
        fused = maps[0] if self.fuser is None else self.fuser(maps)
        decoded = self.decoder["neck"](self.decoder["backbone"](fused))
        return decoded if isinstance(decoded, Tensor) else decoded[0]

    def bev_map(
        self,
        img: Tensor | None = None,
        points: Sequence[Tensor] = (),
        lidar2image: Tensor | None = None,
        camera_intrinsics: Tensor | None = None,
        camera2lidar: Tensor | None = None,
        img_aug_matrix: Tensor | None = None,
        lidar_aug_matrix: Tensor | None = None,
        **_,
    ) -> Tensor:
        """Map a collated batch, with arguments as for `forward`, to what the head reads: (B, C, X, Y)."""
        geometry = None
        if "camera" in self.encoders:
            geometry = CameraGeometry(camera_intrinsics, camera2lidar, lidar2image, img_aug_matrix, lidar_aug_matrix)
        return self.extract_features(img, points, geometry)

    def forward(
        self,
        img: Tensor | None = None,
        points: Sequence[Tensor] = (),
        camera2ego: Tensor | None = None,
        lidar2ego: Tensor | None = None,
        lidar2camera: Tensor | None = None,
        lidar2image: Tensor | None = None,
        camera_intrinsics: Tensor | None = None,
        camera2lidar: Tensor | None = None,
        img_aug_matrix: Tensor | None = None,
        lidar_aug_matrix: Tensor | None = None,
        metas: Sequence[dict] = (),
        gt_masks_bev: Tensor | None = None,
        gt_bboxes_3d: Sequence[LiDARInstance3DBoxes] | None = None,
        gt_labels_3d: Sequence[Tensor] | None = None,
        **_,
    ) -> dict[str, Tensor] | list[dict]:
        """Detect objects, or in training mode compute the losses.

        The arguments are named as BEVFusion's data pipeline names them: a collated batch is passed as `**batch`.

        Args:
            img: (B, N, 3, H, W) normalised images.
            points: list of (P_i, C), metres in the (augmented) LiDAR frame.
            lidar2image, camera_intrinsics, camera2lidar, img_aug_matrix: (B, N, 4, 4); lidar_aug_matrix: (B, 4, 4).
            gt_bboxes_3d, gt_labels_3d: ground truth of each frame, for training.

        Returns:
            In training, losses by name (`loss/object/...`, `stats/object/...`). In evaluation, a dict per frame with
            `boxes_3d` (LiDARInstance3DBoxes), `scores_3d` (K,) and `labels_3d` (K,) on the CPU.
        """
        sensors = {"img": img, "points": points, "camera_intrinsics": camera_intrinsics, "camera2lidar": camera2lidar}
        sensors |= {"lidar2image": lidar2image, "img_aug_matrix": img_aug_matrix, "lidar_aug_matrix": lidar_aug_matrix}
        head = self.heads["object"]
        prediction = head(self.bev_map(**sensors))
        if self.training:
            losses = head.loss(gt_bboxes_3d, gt_labels_3d, prediction)
            return {
                f"{'loss' if loss.requires_grad else 'stats'}/object/{name}": loss * self.loss_scale["object"]
                for name, loss in losses.items()
            }
        return [
            {
                "boxes_3d": LiDARInstance3DBoxes(boxes.cpu(), box_dim=boxes.shape[-1]),
                "scores_3d": scores.cpu(),
                "labels_3d": labels.cpu(),
            }
            for boxes, scores, labels in head.get_bboxes(prediction)
        ]

    def train_step(self, data: dict, optimizer: torch.optim.Optimizer | None = None) -> dict:
        """Run one training step for mmcv's runner: total loss, what to log, and the number of frames."""
        return self.summarise(self(**data), len(data["metas"]))

    @staticmethod
    def summarise(losses: Mapping[str, Tensor], frames: int) -> dict:
        """Turn the losses of `frames` frames into what mmcv's runner expects of a step."""
        total = sum(value for name, value in losses.items() if name.startswith("loss/"))
        values = torch.stack([*losses.values(), total]).detach().tolist()  # together: a GPU is waited for only once
        return {"loss": total, "log_vars": dict(zip([*losses, "loss"], values, strict=True)), "num_samples": frames}
