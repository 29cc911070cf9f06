"""The reference's deterministic weights and inputs, and the conventions its outputs are stored in.

The rules are those of the README beside the reference data.
"""

import json
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bevfusion.models import build_model
from bevfusion.models.detector import LiDARInstance3DBoxes

GAINS = (
    (r"^encoders\.camera\.backbone\.layer\d\.\d\.bn3\.weight$", 0.25),
    (r"^encoders\.camera\.backbone\.layer\d\.0\.downsample\.1\.weight$", 0.5),
    (r"^encoders\.camera\.vtransform\.depthnet\.6\.weight$", 0.5),
    (r"^heads\.object\.shared_conv\.weight$", 0.25),
    (r"^heads\.object\.heatmap_head\.1\.weight$", 0.25),
    (r"^heads\.object\.decoder\.0\..*in_proj_weight$", 0.5),
    (r"^heads\.object\.decoder\.0\.(self|cross)_posembed\.position_embedding_head\.0\.weight$", 0.02),
)
AS_BUILT = re.compile(r"^encoders\.camera\.vtransform\.(dx|bx|nx|frustum)$|relative_position_index$")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_sparse(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a key names a sparse convolution's weight."""
    return key.startswith("encoders.lidar.backbone") and len(shape) == 5


def golden_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of `key` in the reference's layout, `shape`."""
    rng = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    if key.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        value = 0.1 * rng.randn(*shape)
    elif key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    elif len(shape) == 1 and key.endswith(".weight"):
        value = rng.uniform(0.8, 1.2, shape)
    elif len(shape) == 1:
        value = 0.05 * rng.randn(*shape)
    else:
        out_axis = -1 if is_sparse(key, shape) else int(key == "decoder.neck.deblocks.1.0.weight")
        fan_in = np.prod(shape) / shape[out_axis]
        value = rng.randn(*shape) * np.sqrt(2 / fan_in)
    for pattern, gain in GAINS:
        if re.search(pattern, key):
            value = value * gain
    return value.astype(np.float32)


def golden_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The reference's weights for `model`, in the original layout (sparse weights kx, ky, kz, in, out)."""
    state = {}
    for key, value in model.state_dict().items():
        shape = tuple(value.shape)
        if AS_BUILT.search(key):
            state[key] = value
        else:
            shape = (*shape[1:], shape[0]) if is_sparse(key, shape) else shape
            state[key] = torch.from_numpy(np.asarray(golden_tensor(key, shape)))
    return state


def load_golden_weights(model: nn.Module) -> nn.Module:
    """Give `model` the reference's weights."""
    state = golden_state_dict(model)
    model.load_state_dict({k: v.permute(4, 0, 1, 2, 3) if is_sparse(k, v.shape) else v for k, v in state.items()})
    return model


def golden_config(golden: Path, name: str = "resnet50_convfuser") -> dict:
    """The resolved config of the reference."""
    return json.loads((golden / f"config_{name}.json").read_text())


def golden_model(golden: Path, name: str = "resnet50_convfuser") -> nn.Module:
    """The full float model with the reference's weights, in evaluation mode."""
    return load_golden_weights(build_model(golden_config(golden, name)["model"]))


def golden_batch(golden: Path, file: str = "input.npz") -> dict:
    """The reference's frame as a collated batch of one, for `model(**batch)`."""
    data = np.load(golden / file)
    images = (data["images_u8"].astype(np.float64) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    names = ("camera2ego", "lidar2ego", "lidar2camera", "lidar2image", "camera_intrinsics", "camera2lidar")
    matrices = {name: torch.from_numpy(data[name])[None] for name in (*names, "img_aug_matrix", "lidar_aug_matrix")}
    return {
        "img": torch.from_numpy(images.astype(np.float32))[None],
        "points": [torch.from_numpy(data["points"])],
        "metas": [{"token": "golden", "box_type_3d": LiDARInstance3DBoxes}],
        **matrices,
    }


@cache
def sample_indices(size: int, limit: int) -> np.ndarray:
    """Flat indices of the values that the reference keeps of a tensor of `size`."""
    return np.random.RandomState(0).choice(size, min(size, limit), replace=False)


def relative_error(actual: Tensor | np.ndarray, reference: np.ndarray, limit: int = 2048) -> float:
    """Relative L2 error of a tensor's sampled values against the reference's."""
    flat = np.asarray(actual, dtype=np.float64).ravel()
    sampled = flat[sample_indices(flat.size, limit)]
    return float(np.linalg.norm(sampled - reference) / max(np.linalg.norm(reference), 1e-12))


def sort_sparse(indices: Tensor, features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (V, 4) and features (V, C), rows in lexicographic order of (batch, x, y, z)."""
    coordinates = indices.cpu().numpy()
    order = np.lexsort(coordinates.T[::-1])
    return coordinates[order], features.detach().cpu().numpy()[order]
