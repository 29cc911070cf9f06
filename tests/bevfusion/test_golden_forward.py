"""The float model against the reference, stage by stage, with the reference's weights and frame."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bevfusion.boxes import lidar_to_legacy
from bevfusion.config import load_config
from bevfusion.models import build_model
from tests.conftest import ROOT
from tests.golden_model import (
    golden_batch,
    golden_model,
    load_golden_weights,
    relative_error,
    sample_indices,
    sort_sparse,
)

LIDAR = "lidar_voxelnet_0p075"
CONFIGS = ("resnet50_convfuser", "swint_v0p075_convfuser", LIDAR)
DEVICE_TOLERANCE = {"cpu": {"stage": 1e-4, "head": 1e-3}, "cuda": {"stage": 1e-3, "head": 1e-3}}


class Stages:
    """Records what a forward computes, under the reference's stage names."""

    def __init__(self, model: nn.Module):
        self.values: dict[str, Tensor | np.ndarray] = {}
        if "camera" in model.encoders:
            self._watch_camera(model)
        self._watch_lidar(model.encoders["lidar"])
        self._watch(model.decoder["backbone"], self._each("decoder.backbone.out"))
        self._watch(model.decoder["neck"], lambda _, out: {"decoder.neck": out[0]})
        head = model.heads["object"]
        self._watch(head.shared_conv, lambda _, out: {"head.shared_conv": out})
        self._watch(head.decoder[0], lambda x, out: {"head.query_feat_in": x[0], "head.decoder_out": out})
        self._watch(head, lambda _, out: {f"head.{name}": value for name, value in out.items()})

    def _watch(self, module: nn.Module, name) -> None:
        def record(_, inputs, output):
            for key, value in name(inputs, output).items():
                self.values[key] = value.detach().cpu().clone() if isinstance(value, Tensor) else value

        module.register_forward_hook(record)

    @staticmethod
    def _each(prefix: str):
        return lambda _, out: {f"{prefix}{i}": level for i, level in enumerate(out)}

    @staticmethod
    def _sparse(prefix: str):
        def name(_, out):
            coordinates, features = sort_sparse(out.indices, out.features)
            return {f"{prefix}.coords_sorted": coordinates, f"{prefix}.features_sorted": features}

        return name

    def _watch_camera(self, model: nn.Module) -> None:
        camera = model.encoders["camera"]
        view = camera["vtransform"]
        prefix = "camera.vtransform."
        self._watch(camera["backbone"], self._each("camera.backbone.out"))
        self._watch(camera["neck"], self._each("camera.neck.out"))
        self._watch(view.dtransform, lambda x, out: {f"{prefix}depth_map": x[0], f"{prefix}dtransform_out": out})
        names = (f"{prefix}depth_softmax", f"{prefix}context")
        self._watch(view.depthnet, lambda _, out: dict(zip(names, view.split(out), strict=True)))
        self._watch(view.downsample, lambda x, out: {f"{prefix}bev_pooled": x[0], f"{prefix}out": out})
        self._watch(model.fuser, lambda _, out: {"fuser": out})

    def _watch_lidar(self, lidar: nn.ModuleDict) -> None:
        def voxels(_, out):
            coordinates, features = sort_sparse(out[1], out[0])
            return {"lidar.voxelize.coords_sorted": coordinates, "lidar.voxelize.features_sorted": features}

        self._watch(lidar["voxelize"], voxels)
        backbone = lidar["backbone"]
        self._watch(backbone.conv_input, self._sparse("lidar.backbone.conv_input"))
        self._watch(backbone.conv_out, self._sparse("lidar.backbone.conv_out"))
        for stage, layers in backbone.encoder_layers.named_children():
            for index, layer in layers.named_children():
                self._watch(layer, self._sparse(f"lidar.backbone.{stage}.{index}"))
        self._watch(backbone, lambda _, out: {"lidar.backbone.dense_bev": out})


def build(golden: Path, name: str) -> nn.Module:
    if name != LIDAR:
        return golden_model(golden, name)
    config = load_config(ROOT / "configs/nuscenes/det/transfusion/secfpn/lidar/voxelnet_0p075.yaml")
    return load_golden_weights(build_model(config.model))


def to_device(batch: dict, device: str) -> dict:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {**moved, "points": [cloud.to(device) for cloud in batch["points"]]}


@pytest.fixture(scope="module", params=[("cpu", c) for c in CONFIGS] + [("cuda", c) for c in CONFIGS], ids=str)
def run(request, golden):
    """(device, config name, recorded stages, detections) of one forward."""
    device, name = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = build(golden, name).to(device)
    stages = Stages(model)
    with torch.no_grad():
        detections = model(**to_device(golden_batch(golden), device))
    return device, name, stages.values, detections[0]


def reference(golden: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Digests by stage, and sampled values by stage."""
    if name == CONFIGS[0]:
        digests = json.loads((golden / "float_forward.json").read_text())["stages"]
        values = np.load(golden / "float_forward.npz")
        return digests, {stage: values[f"{stage}/val"] for stage in digests if f"{stage}/val" in values.files}
    digests = json.loads((golden / "float_forward_other_configs.json").read_text())[name]["stages"]
    values = np.load(golden / "float_forward_other_configs.npz")
    sampled = {stage: values[f"{name}/{stage}/val"] for stage in digests if f"{name}/{stage}/val" in values.files}
    return digests, sampled


def set_compared(stage: str) -> bool:
    """Whether a stage's columns follow the order of the proposals, which near-ties may swap."""
    dense = ("head.shared_conv", "head.dense_heatmap")
    return stage.startswith("head.") and stage not in dense


@pytest.mark.slow
def test_every_stage_agrees(run, golden):
    device, name, values, _ = run
    digests, sampled = reference(golden, name)
    wrong = {}
    for stage, digest in digests.items():
        if set_compared(stage):
            continue
        assert list(values[stage].shape) == digest["shape"], stage
        if stage.endswith("coords_sorted"):
            assert zlib.crc32(values[stage].astype("<i4").tobytes()) == digest["crc32_int32_le"], stage
            continue
        limit = DEVICE_TOLERANCE[device]["head" if stage.startswith("head.") else "stage"]
        error = relative_error(values[stage], sampled[stage])
        if not error <= limit:
            wrong[stage] = error
    assert not wrong


def proposal_order(flat: np.ndarray) -> np.ndarray:
    """Sorts proposals by their flat index into (classes, X, Y)."""
    return np.argsort(flat, kind="stable")


def flat_proposals(head: dict, shape: tuple[int, ...]) -> np.ndarray:
    """Flat indices of the proposals into the dense heatmap's (classes, X, Y)."""
    cells = np.asarray(head["query_pos"][0]) - 0.5
    _, _, columns, rows = shape
    flat = np.asarray(head["query_labels"][0]) * columns * rows + cells[:, 0] * rows + cells[:, 1]
    return flat.astype(np.int64)


def of_head(values: dict) -> dict:
    """What a forward recorded of the head."""
    return {stage.removeprefix("head."): value for stage, value in values.items() if stage.startswith("head.")}


def whole_head(digests: dict, sampled: dict) -> dict[str, np.ndarray]:
    """The reference's head outputs of which every value is sampled, whole."""
    whole = {}
    for stage, digest in digests.items():
        size = int(np.prod(digest["shape"]))
        if stage.startswith("head.") and size <= sampled[stage].size:
            flat = np.empty(size)
            flat[sample_indices(size, 2048)] = sampled[stage]
            whole[stage.removeprefix("head.")] = flat.reshape(digest["shape"])
    return whole


@pytest.mark.slow
def test_proposals_and_head_maps_agree(run, golden):
    device, name, values, _ = run
    mine, truth = of_head(values), whole_head(*reference(golden, name))
    shape = tuple(mine["dense_heatmap"].shape)
    flat, expected_flat = flat_proposals(mine, shape), flat_proposals(truth, shape)
    assert set(flat.tolist()) == set(expected_flat.tolist())
    a, b = proposal_order(flat), proposal_order(expected_flat)
    for part in ("center", "height", "dim", "rot", "vel", "heatmap", "query_heatmap_score"):
        actual, expected = mine[part][0].numpy()[:, a], truth[part][0][:, b]
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error <= DEVICE_TOLERANCE[device]["head"], part


@pytest.mark.slow
def test_boxes_agree(run, golden):
    _, name, values, detections = run
    if name != CONFIGS[0]:
        pytest.skip("the reference keeps boxes for one configuration")
    truth = np.load(golden / "float_forward.npz")
    flat = flat_proposals(of_head(values), tuple(values["head.dense_heatmap"].shape))
    assert set(flat.tolist()) == set(truth["head/top_proposals_flat_index"].tolist())
    a, b = proposal_order(flat), proposal_order(truth["head/top_proposals_flat_index"])
    boxes = lidar_to_legacy(detections["boxes_3d"].tensor).numpy()[a]
    expected = truth["result/boxes_3d"][b]
    turn = boxes[:, 6] - expected[:, 6]
    assert np.abs(np.delete(boxes, 6, axis=1) - np.delete(expected, 6, axis=1)).max() <= 1e-2
    assert np.abs(np.arctan2(np.sin(turn), np.cos(turn))).max() <= 1e-2
    np.testing.assert_allclose(detections["scores_3d"].numpy()[a], truth["result/scores_3d"][b], atol=1e-3)
    np.testing.assert_array_equal(detections["labels_3d"].numpy()[a], truth["result/labels_3d"][b])
