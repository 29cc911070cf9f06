"""The demo model on a tiny world: whole runs of `qat/ptq.py` in a second or two each."""

from pathlib import Path

from bevfusion.create_data import create_data
from tests.bevfusion.tiny_nuscenes import TinyNuScenes
from tests.conftest import ROOT
from tests.qat.ptq_samples import Outcome, run_here

CONFIG = ROOT / "configs/demo/camera+lidar/resnet50.yaml"
CKPT = ROOT / "model/demo/bevfusion-demo.pth"
SCENES = ("scene-0061", "scene-0553", "scene-0655", "scene-0103")  # the last is in mini_val
TRAINING_FRAMES = 9
# A smaller piece of the world; the weights stay as they are.
SMALLER = (
    "point_cloud_range=[-25.6,-25.6,-5.0,25.6,25.6,3.0]",
    "model.encoders.lidar.backbone.sparse_shape=[512,512,41]",
    "model.encoders.camera.vtransform.xbound=[-25.6,25.6,0.4]",
    "model.encoders.camera.vtransform.ybound=[-25.6,25.6,0.4]",
)


def write_world(root: Path) -> Path:
    """Write the world and its info files, with nine training frames."""
    folder = TinyNuScenes(root, scenes=SCENES).save()
    create_data(folder, "v1.0-mini", database=False)
    return folder


def arguments(root: Path, save: Path, *more: object, frames: int = 3) -> list[str]:
    """Command line of a run; `more` may end with `--cfg-options`."""
    given = ["--config", CONFIG, "--ckpt", CKPT, "--dataset-root", root, "--device", "cpu", "--workers", 0]
    given += [
        "--no-verify",
        "--calib-pipeline",
        "test",
        "--calibrate_batch",
        frames,
        "--save",
        save,
        "--cfg-options",
        *SMALLER,
        *more,
    ]
    return list(map(str, given))


def ptq(root: Path, save: Path, *more: object, frames: int = 3) -> Outcome:
    """Run it in this process."""
    return run_here(*arguments(root, save, *more, frames=frames))
