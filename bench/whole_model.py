"""The whole BEVFusion: a plain, an observing and a fake-quantised forward, with the library and with ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from bench.timing import Row, medians, rows
from bevfusion.config import load_config
from bevfusion.models import build_model
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights, input_quantizers, observe, observing
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.quantize import initialize, set_quantizer_fast
from lean.ranges import set_amax
from lean.switches import disable_quantization, named_quantizers, quantized_layers, quantizer_flags
from qat.arguments import DEFAULT_CONFIG

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"cuda": DEFAULT_CONFIG, "cpu": "configs/demo/camera+lidar/resnet50.yaml"}
FOCAL, CAMERA_HEIGHT, LIDAR_HEIGHT = 1266.0, 1.5, 1.8  # pixels of a 1600 x 900 image; metres


def model_config(device: str, config: str | None) -> dict:
    """The resolved config: the one asked for, else the default for the device."""
    return load_config(ROOT / (config or CONFIGS[device]))


def random_cloud(points: int, limits: list[float], seed: int = 0) -> Tensor:
    """(points, 5) float32: ground and upright things, denser near the sensor, as ten sweeps of a LiDAR see them."""
    generator = torch.Generator().manual_seed(seed)
    angle, share, height = torch.rand(3, points, generator=generator)
    radius = 2 + (min(limits[3], limits[4]) - 2) * share**2
    z = torch.where(height < 0.6, -LIDAR_HEIGHT + 0.05 * torch.randn(points, generator=generator), 4 * height - 4)
    rest = torch.rand(points, 2, generator=generator)
    xy = torch.stack([radius * torch.cos(2 * math.pi * angle), radius * torch.sin(2 * math.pi * angle)], 1)
    return torch.cat([xy, z[:, None], rest * torch.tensor([255.0, 0.5])], 1)


def random_batch(cfg: Mapping, points: int) -> dict:
    """A batch of one frame: six cameras all around, random images, and a random cloud; arguments of the model."""
    height, width = cfg["image_size"]
    scale = width / 1600
    intrinsics, augmentation = torch.eye(4), torch.eye(4)
    intrinsics[:3, :3] = torch.tensor([[FOCAL, 0, 800], [0, FOCAL, 450], [0, 0, 1]])
    augmentation[0, 0] = augmentation[1, 1] = scale
    augmentation[1, 3] = height - 900 * scale  # the lower part is kept
    to_lidar = []
    for camera in range(6):
        cos, sin = math.cos(camera * math.pi / 3), math.sin(camera * math.pi / 3)
        pose = torch.eye(4)
        pose[:3, :3] = torch.tensor([[sin, 0, cos], [-cos, 0, sin], [0, -1, 0]])  # x right, y down, z forward
        pose[2, 3] = CAMERA_HEIGHT - LIDAR_HEIGHT
        to_lidar.append(pose)
    camera2lidar = torch.stack(to_lidar)
    return {
        "img": torch.randn(1, 6, 3, height, width, generator=torch.Generator().manual_seed(0)),
        "points": [random_cloud(points, cfg["point_cloud_range"])],
        "camera_intrinsics": intrinsics.expand(1, 6, 4, 4).contiguous(),
        "camera2lidar": camera2lidar[None],
        "lidar2image": (intrinsics @ camera2lidar.inverse())[None],
        "img_aug_matrix": augmentation.expand(1, 6, 4, 4).contiguous(),
        "lidar_aug_matrix": torch.eye(4)[None],
    }


def quantised(model: nn.Module) -> nn.Module:
    """Quantise a float `model` in place, up to calibration."""
    insert_quantizers(model, default_recipe(model))
    fold_sparse(model)
    fold_dense(model)
    return model


def with_library_quantizers(model: nn.Module) -> nn.Module:
    """A copy of a calibrated model whose quantizers are the library's own."""
    model = copy.deepcopy(model)
    theirs = {}
    for quantizer in named_quantizers(model).values():
        method = "histogram" if quantizer.axis is None else "max"
        theirs[quantizer] = TensorQuantizer(QuantDescriptor(axis=quantizer.axis, calib_method=method))
        theirs[quantizer].register_buffer("_amax", quantizer.amax)
    for layer in quantized_layers(model).values():
        for name in ("_input_quantizer", "_weight_quantizer"):
            if hasattr(layer, name):
                setattr(layer, name, theirs[getattr(layer, name)])
    return model


def timed(device: str, cfg: Mapping, plain: nn.Module, ours: nn.Module, points: int, repeats: int) -> list[Row]:
    """Rows for one size of the cloud."""
    batch = {
        key: [part.to(device) for part in value] if key == "points" else value.to(device)
        for key, value in random_batch(cfg, points).items()
    }
    calibrate_weights(ours)
    with observing(ours) as observers:
        observe(ours, [batch], 1, lambda model, one: model(**one))
        set_amax(ours, observers.statistics())
        theirs = with_library_quantizers(ours)
        set_quantizer_fast(theirs)
        inputs = {side: input_quantizers(model).values() for side, model in (("stock", theirs), ("lean", ours))}
        both = {"stock": theirs, "lean": ours}

        def observing_forward(side: str) -> None:
            every = named_quantizers(both[side]).values()
            with (
                quantizer_flags(every, _if_quant=False, _if_calib=False),
                quantizer_flags(inputs[side], _if_calib=True),
            ):
                both[side](**batch)

        tasks = {"plain": lambda: plain(**batch)}
        for side in both:
            tasks[f"observing, {side}"] = lambda side=side: observing_forward(side)
        for side in both:
            tasks[f"fake-quantised, {side}"] = lambda side=side: both[side](**batch)
        with torch.no_grad():
            return rows(f"{cfg_name(cfg)}, {points} points", medians(tasks, device, repeats), "plain")


def cfg_name(cfg: Mapping) -> str:
    """Backbone and image size, to tell models apart."""
    backbone, size = cfg["model"]["encoders"]["camera"]["backbone"], cfg["image_size"]
    return f"BEVFusion {backbone['type']}, 6x{size[0]}x{size[1]}"


def forwards(device: str, repeats: int, config: str | None, points: list[int] | None) -> list[Row]:
    """Rows for clouds of each number of points."""
    initialize()
    cfg = model_config(device, config)
    torch.manual_seed(0)
    ours = quantised(build_model(cfg["model"]).eval()).to(device)
    plain = copy.deepcopy(ours)
    disable_quantization(plain).apply()  # the same folded convolutions in float
    sizes = points or ([30_000, 250_000] if device == "cuda" else [20_000])
    return [row for size in sizes for row in timed(device, cfg, plain, ours, size, repeats)]
