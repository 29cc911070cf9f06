"""The real keyframe through the original's pipelines, against what the original made of it."""

import hashlib
import json
import random

import mmcv.parallel
import numpy as np
import pytest
import torch

from bevfusion.data import build_dataset, to_device
from bevfusion.data.pipelines import GTDepth
from tests.bevfusion.data_samples import angle_difference, dataset_config, legacy_boxes, reference_config

MATRICES = (
    "camera2ego", "lidar2ego", "lidar2camera", "lidar2image", "camera_intrinsics", "camera2lidar", "img_aug_matrix",
    "lidar_aug_matrix",
)  # fmt: skip
MEAN, STD = (np.array(v, dtype=np.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
AS_REFERENCE = {
    "LoadPointsFromMultiSweeps": {"pad_empty_sweeps": False},
    "LoadBEVSegmentation": None,
    "ObjectPaste": None,
}


def build(golden, realframe, which, layout="mmdet3d", **steps):
    infos = {"mmdet3d": next(realframe.glob("*.pkl")), "original": golden / "realframe_info.json"}
    return build_dataset(dataset_config(reference_config(golden), which, realframe, infos[layout], **steps))


def batch_of(dataset):
    return to_device(mmcv.parallel.collate([dataset[0]], 1), "cpu")


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def assert_equals_reference(batch, reference):
    images = (reference["images_u8"].astype(np.float32) / 255 - MEAN) / STD
    np.testing.assert_array_equal(batch["img"][0].numpy(), images)
    np.testing.assert_allclose(batch["points"][0].numpy(), reference["points"], rtol=1e-6, atol=1e-6)
    for name in MATRICES:
        assert batch[name].dtype == torch.float32
        rounding = np.finfo(np.float32).eps * np.abs(reference[name]).max()  # the reference adds up in float32
        np.testing.assert_allclose(batch[name][0].numpy(), reference[name], rtol=1e-6, atol=rounding, err_msg=name)
    boxes, expected = legacy_boxes(batch["gt_bboxes_3d"][0]), reference["gt_bboxes_3d"]
    columns = [0, 1, 2, 3, 4, 5, 7, 8]
    np.testing.assert_allclose(boxes[:, columns], expected[:, columns], rtol=1e-6, atol=1e-6)
    assert np.abs(angle_difference(boxes[:, 6], expected[:, 6])).max() < 1e-6
    np.testing.assert_array_equal(batch["gt_labels_3d"][0].numpy(), reference["gt_labels_3d"])


@pytest.mark.parametrize("layout", ["mmdet3d", "original"])
def test_test_pipeline_reproduces_the_reference_frame(golden, realframe, layout):
    batch = batch_of(build(golden, realframe, "test", layout, **AS_REFERENCE))
    assert_equals_reference(batch, np.load(golden / "input.npz"))
    digests = json.loads((golden / "input.json").read_text())
    assert sha256(batch["points"][0]) == digests["points_sha256"]
    images = batch["img"][0].double()
    digest = digests["normalised_images"]
    assert images.mean().item() == pytest.approx(digest["mean"], abs=1e-12)
    assert images.std(unbiased=False).item() == pytest.approx(digest["std"], abs=1e-12)
    assert images.abs().max().item() == digest["absmax"]


def test_train_pipeline_reproduces_the_reference_frame(golden, realframe):
    dataset = build(golden, realframe, "train", **AS_REFERENCE)
    names = [type(transform).__name__ for transform in dataset.pipeline.transforms]
    assert names == json.loads((golden / "ptq_reference_2frames.json").read_text())["train_pipeline"]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert_equals_reference(batch_of(dataset), np.load(golden / "input_train.npz"))


def test_padding_repeats_the_keyframe_as_the_original_does(golden, realframe):
    dataset = build(golden, realframe, "test", LoadBEVSegmentation=None)
    points = dataset[0]["points"].data.numpy()
    expected = json.loads((golden / "input.json").read_text())["default_pipeline_pad_empty_sweeps"]
    assert len(points) == expected["num_points"]
    assert sha256(points) == expected["points_sha256"]


def test_pillow_differs_from_the_reference_in_chroma_only(golden, realframe):
    steps = {**AS_REFERENCE, "LoadMultiViewImageFromFiles": {"decoder": "pillow"}}
    images = batch_of(build(golden, realframe, "test", **steps))["img"][0].numpy()
    difference = (images * STD + MEAN) * 255 - np.load(golden / "input.npz")["images_u8"]
    luma = np.tensordot(np.array([0.299, 0.587, 0.114]), difference, (0, 1))
    assert np.abs(luma).max() < 2  # levels of 255: rounding of decoder and resampling
    assert np.abs(luma).mean() < 0.1
    assert 1 < np.abs(difference).max() < 10
    assert np.abs(difference).mean() < 0.2


def test_depth_map_equals_the_one_the_model_projects(golden, realframe):
    dataset = build(golden, realframe, "test", **AS_REFERENCE)
    points = dataset[0]["points"].data.clone()
    data = GTDepth()(dataset[0])
    reference = np.load(golden / "camera_geometry.npz")
    expected = np.zeros(6 * 256 * 704, dtype=np.float32)
    expected[reference["depth_map_nonzero_flat_index"]] = reference["depth_map_nonzero_value"]
    depths = data["depths"].numpy()
    assert depths.shape == (6, 256, 704)
    np.testing.assert_allclose(depths.ravel(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data["points"].data, points, rtol=0, atol=0)
