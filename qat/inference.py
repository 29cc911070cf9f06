"""Running float and quantised models over frames, shared by the scripts that evaluate and show them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bevfusion.checkpoint import load_checkpoint, pickled_classes, read_file
from bevfusion.data import FrameLoader, NuScenesDataset, build_dataset, calibration_dataset, frames_of, to_device
from bevfusion.data.loader import GROUND_TRUTH_ONLY
from bevfusion.errors import InputError
from bevfusion.models import build_model
from lean.artifact import load as load_artifact
from lean.checked_file import holds_checked
from lean.export.rounding import round_to_file
from qat.deployed import DeployedPipeline, dump_frame, in_stages, open_files

WHOLE_MODEL_TYPES = {"mmcv.parallel.data_parallel.MMDataParallel", "bevfusion.models.detector.BEVFusion"}


@dataclass(frozen=True)
class Detector:
    """Runs the models of files, or exported files of folders, over frames of one data set.

    Attributes:
        integer, half_points: how exported files compute, see `qat.deployed.open_files`.
        round_lidar: give models the numbers of the LiDAR branch's file.
    """

    cfg: Mapping[str, Any]
    dataset: NuScenesDataset
    device: torch.device
    workers: int = 0
    integer: bool = True
    half_points: bool = False
    round_lidar: bool = False

    def open(self, file: str | Path) -> nn.Module | DeployedPipeline:
        """Load a model, or put together what a folder holds.

        Raises:
            InputError: it can't be loaded, or does not fit the config.
            QuantizationError: exported files are missing or can't be executed.
        """
        if Path(file).is_dir():
            return open_files(self.cfg, file, self.integer, self.half_points)
        model = load_model(self.cfg, file, self.device)
        if self.round_lidar and "lidar" in model.encoders:
            round_to_file(model.encoders["lidar"]["backbone"])
            model.encoders["lidar"]["voxelize"].half_features = True
        return model

    def batches(self, frames: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The frames with these indices, one a batch, on the device."""
        loader = FrameLoader(self.dataset, 1, self.workers, sampler=frames)
        return (to_device(batch, self.device) for batch in loader)

    def __call__(self, file: str | Path, frames: Sequence[int], title: str) -> list[dict]:
        """Results (boxes_3d, scores_3d, labels_3d on the CPU) of the frames with these indices, with a progress bar.

        Raises:
            InputError, QuantizationError: as `open`, or a frame can't be read.
        """
        model = self.open(file)
        results = []
        with torch.no_grad():
            for batch in tqdm(self.batches(frames), title, len(frames), unit="frame", disable=None):
                results += model(**batch)
        return results

    def dump(self, file: str | Path, frame: int, folder: str | Path) -> None:
        """Write the tensors between the stages of one frame, see `qat.deployed.dump_frame`.

        Raises:
            InputError, QuantizationError: as `open`, or the folder can't be written.
        """
        model = self.open(file)
        pipeline = model if isinstance(model, DeployedPipeline) else in_stages(model)
        for batch in self.batches([frame]):
            dump_frame(pipeline, batch, folder)


def load_model(cfg: Mapping[str, Any], path: str | Path, device: torch.device) -> nn.Module:
    """Model in evaluation mode on `device`, from a float checkpoint or from either file of a quantised model.

    The pickle of a model runs code when it is loaded: open only files that you trust. A `.safetensors` file runs none.

    Raises:
        InputError: the file is missing, damaged, or does not fit the config.
        QuantizationError: likewise, of a `.safetensors` file.
    """
    if not holds_whole_model(path):
        model = build_model(cfg["model"])
        load_checkpoint(model, path)
    elif holds_checked(Path(path)):
        model = load_artifact(Path(path))
    else:
        try:
            model = read_file(path, trust_pickle=True)
        except (AttributeError, ImportError) as error:
            raise InputError(f"{path} comes from another version of this project ({error}): quantise anew") from error
        model = getattr(model, "module", model)
    return model.to(device).eval()


def holds_whole_model(path: str | Path) -> bool:
    """Whether a file is a model that `qat/ptq.py` has saved, judged without loading it.

    Of a file of `torch.save` the classes that it names tell.

    Raises:
        InputError: there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint not found: {path}")
    if holds_checked(Path(path)):
        return True
    return not WHOLE_MODEL_TYPES.isdisjoint(pickled_classes(path))


def evaluation_dataset(cfg: Mapping[str, Any], split: str = "val") -> NuScenesDataset:
    """Frames of a split (train, val, test) through the test pipeline, without transforms for map ground truth.

    Raises:
        InputError: the data can't be used.
    """
    if split == "train":
        return frames_of(calibration_dataset(cfg, "test"))
    config = cfg["data"][split]
    steps = [step for step in config["pipeline"] if step["type"] not in GROUND_TRUTH_ONLY]
    return frames_of(build_dataset({**config, "pipeline": steps, "test_mode": True}))


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` frames, evenly spread, so that every scene has its part."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def short_names(files: Sequence[str]) -> list[str]:
    """A heading for each file: its name, its whole path where names are equal, numbered where paths are equal, too."""
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        names = list(files)
    return names if len(set(names)) == len(names) else [f"{name} ({k})" for k, name in enumerate(names, 1)]


def ensure_writable(path: str | Path) -> None:
    """Make the folder of a file that is to be written later, and try it; raises OSError if that fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f"{path.name}.partial")
    probe.touch()
    probe.unlink()
