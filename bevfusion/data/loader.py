"""Batches: loading frames in worker processes, and the frames that calibration runs over."""

import contextlib
import itertools
import random
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import mmcv.parallel
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from bevfusion.data.nuscenes import NuScenesDataset
from bevfusion.data.pipelines.paste import MissingDatabaseError
from bevfusion.data.wrappers import build_dataset
from bevfusion.errors import InputError, explaining
from bevfusion.processes import limit_numpy_threads

BUNDLE = "DefaultFormatBundle3D and Collect3D"  # transforms that make a sample fit for a batch
GROUND_TRUTH_ONLY = ("LoadBEVSegmentation",)  # transforms that draw nothing at random and make nothing a forward reads


class _Guarded(Dataset):
    """A data set that returns input errors: raised in a worker they would reach us as text with a traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except InputError as error:
            return error


class _Container(mmcv.parallel.DataContainer):
    """A DataContainer of a batch that torch's loader can move to page-locked memory."""

    @classmethod
    def of(cls, value: Any) -> Any:
        """A DataContainer as one of this kind, anything else as it is."""
        if not isinstance(value, mmcv.parallel.DataContainer):
            return value
        return cls(value.data, value.stack, value.padding_value, value.cpu_only, value.pad_dims)

    def pin_memory(self) -> "_Container":
        """The same with its tensors in memory that a GPU copies from while the host goes on."""
        if self.cpu_only:
            return self
        return _Container(pin_memory(self.data), self.stack, self.padding_value, self.cpu_only, self.pad_dims)


class FrameLoader:
    """Batches of a data set, collated by mmcv: a dict of DataContainers, as `MMDataParallel` takes it.

    Where CUDA is in use the batches lie in page-locked memory.

    Args:
        dataset: data set whose pipeline ends with `Collect3D`.
        batch_size: frames a batch; the last batch may be smaller.
        workers: number of processes that load; 0 loads in this one.
        sampler: indices in order; all of them if None.
        keep_errors: yield the InputError of a batch that can't be loaded in its place, instead of raising it.

    Raises:
        InputError: while iterating, a file is missing or damaged.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        workers: int,
        sampler: Iterable[int] | None = None,
        keep_errors: bool = False,
    ):
        self.dataset, self.keep_errors = dataset, keep_errors
        collate = partial(_collate, batch_size=batch_size)
        self.batches = DataLoader(
            _Guarded(dataset),
            batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_initialized(),
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any] | InputError]:
        for batch in self.batches:
            if isinstance(batch, InputError) and not self.keep_errors:
                raise batch
            yield batch


def _start_worker(_: int) -> None:
    """One thread for each process; signals to all of them are for the main one, which may want the frame at hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    limit_numpy_threads()  # torch limits its own


def _collate(samples: Sequence[Any], batch_size: int) -> Any:
    """The batch of `samples`, or the first error among them, or why they can't be joined."""
    errors = [sample for sample in samples if isinstance(sample, InputError)]
    if errors:
        return errors[0]
    try:
        with explaining("what the config's pipeline gives can't be joined into a batch", "end it with " + BUNDLE):
            batch = mmcv.parallel.collate(samples, batch_size)
    except InputError as error:
        return error
    return {key: _Container.of(value) for key, value in batch.items()}


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Arguments of a model's forward: a collated batch without its DataContainers, tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, mmcv.parallel.DataContainer):
            return value.data[0] if value.cpu_only else move(value.data[0])
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    return {key: move(value) for key, value in batch.items()}


def frames_of(dataset: Dataset) -> NuScenesDataset:
    """The data set of distinct frames inside wrappers such as CBGSDataset or RepeatDataset.

    Raises:
        InputError: there is none.
    """
    while not isinstance(dataset, NuScenesDataset):
        if not hasattr(dataset, "dataset"):
            raise InputError(
                f"calibration needs one NuScenesDataset, in wrappers or not; found {type(dataset).__name__}"
            )
        dataset = dataset.dataset
    return dataset


def calibration_dataset(cfg: Mapping[str, Any], pipeline: Literal["train", "test"] = "train") -> Dataset:
    """Training frames of a resolved config, through its train pipeline or, without augmentation, its test pipeline.

    Transforms that only make ground truth for map segmentation are left out: no forward reads it.

    Raises:
        InputError: the data can't be used; if the ground-truth database is missing, both ways out are named.
    """
    try:
        with explaining("the calibration frames of the config can't be opened", "check data.train and data.test"):
            steps = None if pipeline == "train" else cfg["data"]["test"]["pipeline"]
            dataset = build_dataset(_calibration_config(cfg["data"]["train"], steps))
            len(dataset)  # wrappers multiply by what the config says
            return dataset
    except MissingDatabaseError as error:
        raise InputError(f"{error}, or calibrate without augmentation: --calib-pipeline test") from error


def _calibration_config(cfg: Mapping[str, Any], test_pipeline: Sequence[Mapping] | None) -> dict[str, Any]:
    """`cfg` with the pipeline of the innermost data set changed."""
    if "dataset" in cfg:
        return {**cfg, "dataset": _calibration_config(cfg["dataset"], test_pipeline)}
    steps = cfg["pipeline"] if test_pipeline is None else test_pipeline
    steps = [step for step in steps if step["type"] not in GROUND_TRUTH_ONLY]
    return {**cfg, "pipeline": steps, "test_mode": cfg.get("test_mode", False) or test_pipeline is not None}


def calibration_frames(dataset: Dataset, count: int, seed: int) -> list[int]:
    """Indices into `frames_of(dataset)`: `count` distinct frames, spread evenly over scenes and each scene's time.

    A pure function of the frames' scenes and of the seed; all frames if there are fewer than `count`. Scenes take
    turns, so that the first frames are spread, too.

    Raises:
        InputError: `count` is less than 1.
    """
    if count < 1:
        raise InputError(f"calibration needs at least one frame, not {count}")
    scenes: dict[str, list[int]] = {}
    for index, frame in enumerate(frames_of(dataset).data_infos):
        scenes.setdefault(frame.scene, []).append(index)
    generator = np.random.default_rng(seed)
    order = [list(scenes.values())[i] for i in generator.permutation(len(scenes))]
    chosen = [_spread(scene, share, generator) for scene, share in zip(order, _shares(order, count), strict=True)]
    turns = itertools.zip_longest(*chosen)
    return [index for turn in turns for index in turn if index is not None]


def _shares(scenes: Sequence[Sequence[int]], count: int) -> list[int]:
    """How many frames each scene gives: equal numbers as far as scenes are long enough, remainders to the first."""
    shares = [0] * len(scenes)
    left = min(count, sum(map(len, scenes)))
    while left:
        longer = [i for i, scene in enumerate(scenes) if shares[i] < len(scene)]
        step = max(left // len(longer), 1)
        for i in longer[:left]:
            more = min(step, len(scenes[i]) - shares[i])
            shares[i] += more
            left -= more
    return shares


def _spread(scene: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
    """One frame at random out of each of `count` equal stretches of a scene, in random order."""
    bounds = np.linspace(0, len(scene), count + 1).astype(int)
    picks = [scene[generator.integers(low, high)] for low, high in itertools.pairwise(bounds)]
    return [picks[i] for i in generator.permutation(count)]


def calibration_loader(
    dataset: Dataset,
    indices: Sequence[int],
    batch_size: int = 1,
    workers: int = 0,
    seed: int = 0,
    keep_errors: bool = False,
) -> FrameLoader:
    """Batches over the frames `indices` of `frames_of(dataset)`, in this order.

    Every frame is augmented under a random state that depends on the seed and the frame alone: the number of workers,
    the batch size and the frames before it change nothing. Frames without objects are kept. `keep_errors`: see
    `FrameLoader`.
    """
    return FrameLoader(_SeededFrames(frames_of(dataset), indices, seed), batch_size, workers, keep_errors=keep_errors)


class _SeededFrames(Dataset):
    def __init__(self, dataset: NuScenesDataset, indices: Sequence[int], seed: int):
        self.dataset, self.indices, self.seed = dataset, list(indices), seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        with seeded(self.seed, index):
            return self.dataset.prepare(index)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators from non-negative integers; restore their states at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(numbers[0]))
    np.random.seed(numbers[1])
    torch.default_generator.manual_seed(int(numbers[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
