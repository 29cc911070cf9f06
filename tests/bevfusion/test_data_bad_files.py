"""Missing and damaged sensor files: one line that names the frame, the file and what to do."""

import shutil

import numpy as np
import pytest

from bevfusion.data import build_dataset
from bevfusion.errors import InputError
from tests.bevfusion.data_samples import dataset_config, reference_config, reference_info, write_infos


@pytest.fixture
def root(tmp_path, realframe, golden):
    """A data root of the one real frame, files bare in the root."""
    for path in [*realframe.glob("*.jpg"), *realframe.glob("*.bin")]:
        shutil.copy(path, tmp_path / path.name)
    write_infos(tmp_path / "infos.json", [reference_info(golden)])
    return tmp_path


def complaint(root, golden, which="test"):
    steps = {"LoadBEVSegmentation": None, "ObjectPaste": None}
    cfg = dataset_config(reference_config(golden), which, root, root / "infos.json", **steps)
    with pytest.raises(InputError) as caught:
        build_dataset(cfg)[0]
    message = str(caught.value)
    assert message.startswith(f"frame {reference_info(golden)['token']}: ")
    assert "\n" not in message
    return message


def camera_file(root):
    return next(root.glob("*__CAM_BACK_LEFT__*.jpg"))


def lidar_file(root):
    return next(root.glob("*__LIDAR_TOP__*.bin"))


@pytest.mark.parametrize("which", ["test", "train"])
def test_missing_image(root, golden, which):
    camera_file(root).unlink()
    message = complaint(root, golden, which)
    assert camera_name(golden) in message
    assert "CAM_BACK_LEFT file" in message
    assert f"does not exist (data root: {root}); complete the data set" in message


def camera_name(golden):
    return reference_info(golden)["cams"]["CAM_BACK_LEFT"]["data_path"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"not a jpeg" * 100,
        lambda content: content[:200] + b"\0" * (len(content) - 200),
    ],
    ids=["truncated", "empty", "garbage", "header-only"],
)
def test_corrupt_jpeg(root, golden, damage):
    path = camera_file(root)
    path.write_bytes(damage(path.read_bytes()))
    message = complaint(root, golden)
    assert f"image {path} can't be decoded" in message
    assert "copy it again from the data set" in message


def test_missing_cloud(root, golden):
    lidar_file(root).unlink()
    assert "LIDAR_TOP file" in complaint(root, golden)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda points: points[:0], "is empty"),
        (lambda points: points * np.where(np.arange(len(points)) == 7, np.nan, 1)[:, None], "holds NaN or infinite"),
        (lambda points: points * np.float32(np.inf), "holds NaN or infinite"),
        (lambda points: points.ravel()[:-1], "is cut off"),
        (lambda points: points.tobytes()[:-2], "is cut off"),
        (lambda points: points + 1000, "has no point inside point_cloud_range"),
    ],
    ids=["empty", "nan", "infinite", "cut-value", "cut-byte", "out-of-range"],
)
def test_damaged_cloud(root, golden, damage, words):
    path = lidar_file(root)
    damaged = damage(np.fromfile(path, dtype="<f4").reshape(-1, 5))
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.astype("<f4").tobytes())
    message = complaint(root, golden)
    assert str(path) in message
    assert words in message


def test_damaged_sweep(root, golden):
    info = reference_info(golden)
    (root / "sweep.bin").touch()
    pose = {"sensor2lidar_rotation": np.eye(3).tolist(), "sensor2lidar_translation": [0, 0, 0]}
    info["sweeps"] = [{"data_path": "sweep.bin", "timestamp": info["timestamp"] - 50_000, **pose}]
    write_infos(root / "infos.json", [info])
    assert f"point cloud {root / 'sweep.bin'} is empty" in complaint(root, golden)
    (root / "sweep.bin").unlink()
    assert "LIDAR_TOP file sweep.bin does not exist" in complaint(root, golden)
