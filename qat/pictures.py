"""Frames as pictures: what their sensors saw, with what models find in them."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from bevfusion.data import NuScenesDataset
from bevfusion.data.pipelines.images import LoadMultiViewImageFromFiles
from bevfusion.data.pipelines.points import load_cloud
from bevfusion.visualize import PALETTE, Objects, SensorData, camera_views, draw_birds_eye_view, drawn_layers

POINT_COLUMNS = 5  # of nuScenes' point clouds
CAMERA_WIDTH, BIRDS_EYE = 400, 720  # pixels
JPEG_QUALITY = 78
SCORE = 0.3  # least of a drawn detection


def load_frame(dataset: NuScenesDataset, index: int) -> tuple[SensorData, Objects | None]:
    """Full-size images, points of the keyframe and ground truth (None in a test split) of a frame.

    Raises:
        InputError: a file is missing or damaged.
    """
    frame, info = dataset.data_infos[index], dataset.get_data_info(index)
    images, matrices = {}, {}
    if "image_paths" in info:
        loaded = LoadMultiViewImageFromFiles()({"image_paths": info["image_paths"]})["img"]
        images = {name: np.asarray(image) for name, image in zip(frame.cameras.names, loaded, strict=True)}
        matrices = dict(zip(frame.cameras.names, info["lidar2image"], strict=True))
    sensors = SensorData(frame.token, images, matrices, load_cloud(info["lidar_path"], POINT_COLUMNS))
    if frame.ground_truth is None:
        return sensors, None
    truth = info["ann_info"]
    return sensors, Objects(truth["gt_bboxes_3d"].tensor.numpy(), truth["gt_labels_3d"])


def drawable(result: Mapping[str, Any], score: float, z_at_centre: bool = False) -> Objects:
    """Detections of a model's result with at least this score, z brought to the bottom."""
    keep = result["scores_3d"] >= score
    boxes = result["boxes_3d"].tensor[keep].numpy()
    if z_at_centre:
        boxes[:, 2] -= boxes[:, 5] / 2
    return Objects(boxes, result["labels_3d"][keep].numpy(), result["scores_3d"][keep].numpy())


def compare(
    dataset: NuScenesDataset, frames: Sequence[int], before: Sequence[Mapping], after: Sequence[Mapping]
) -> list[dict[str, Any]]:
    """A report's `pictures` (see `lean.report.schema`) of the frames, with the results of the float and INT8 model.

    Raises:
        InputError: a file of a frame is missing or damaged.
    """
    pictures = []
    for index, *results in zip(frames, before, after, strict=True):
        sensors, truth = load_frame(dataset, index)
        found = [drawable(result, SCORE) for result in results]
        layers = [drawn_layers(dataset.CLASSES, truth, one) for one in found]
        views = []
        if sensors.images:
            views.append(_view("Cameras", [camera_views(sensors, one, CAMERA_WIDTH) for one in layers]))
        views.append(_view("Bird's-eye view", [draw_birds_eye_view(sensors.points, one, BIRDS_EYE) for one in layers]))
        counts = " and ".join(f"{len(one.boxes)} in {name}" for one, name in zip(found, ("FP32", "INT8"), strict=True))
        note = (
            f"Boxes with a score of {SCORE} or more: {counts}. Ground truth is white." if truth else f"Boxes: {counts}."
        )
        pictures.append({"token": sensors.token, "note": note, "views": views})
    return pictures


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """The colour of each class in the pictures, as #rrggbb."""
    return {name: "#{:02x}{:02x}{:02x}".format(*PALETTE[label % len(PALETTE)]) for label, name in enumerate(classes)}


def _view(title: str, images: Sequence[np.ndarray]) -> dict[str, Any]:
    height, width = images[0].shape[:2]
    before, after = map(data_uri, images)
    return {"title": title, "float": before, "int8": after, "width": width, "height": height}


def data_uri(image: np.ndarray) -> str:
    """A JPEG of an RGB image (H, W, 3) uint8, as a URI that holds its data."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), options)[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"
