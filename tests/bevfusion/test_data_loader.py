"""Batches, wrappers, and the frames of calibration."""

import multiprocessing
import os
import random
import signal
from collections import Counter

import mmdet3d.datasets.dataset_wrappers
import numpy as np
import pytest
import torch
from mmcv.parallel import DataContainer

from bevfusion.create_data import create_data
from bevfusion.data import (
    CBGSDataset,
    FrameLoader,
    NuScenesDataset,
    build_dataset,
    calibration_dataset,
    calibration_frames,
    calibration_loader,
    frames_of,
    to_device,
)
from bevfusion.errors import InputError
from tests.bevfusion.data_samples import (
    CLASSES,
    dataset_config,
    many_infos,
    reference_config,
    reference_info,
    small_steps,
    write_infos,
)
from tests.bevfusion.tiny_nuscenes import KEYFRAMES, TinyNuScenes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = TinyNuScenes(tmp_path_factory.mktemp("nuscenes")).save()
    create_data(root, "v1.0-mini", 10, 1)
    return root


@pytest.fixture
def train(tiny, golden):
    cfg = dataset_config(reference_config(golden), "train", tiny, tiny / "nuscenes_infos_train.pkl", **small_steps())
    return build_dataset({"type": "CBGSDataset", "dataset": cfg})


def frames_without_files(tmp_path, golden, scenes):
    return NuScenesDataset(write_infos(tmp_path / "infos.json", many_infos(golden, scenes)), object_classes=CLASSES)


def assert_equal_batches(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
        elif key == "points":
            assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True))
        elif key == "gt_bboxes_3d":
            assert all(torch.equal(x.tensor, y.tensor) for x, y in zip(a[key], b[key], strict=True))


# --- batches


def test_batches_have_what_the_model_takes(train):
    batch = next(iter(FrameLoader(train, 2, 0)))
    assert isinstance(batch["img"], DataContainer)
    batch = to_device(batch, "cpu")
    assert batch["img"].shape == (2, 6, 3, 32, 64)
    assert batch["img"].dtype == torch.float32
    assert [points.shape[1] for points in batch["points"]] == [5, 5]
    for name in ("camera2ego", "lidar2camera", "lidar2image", "camera_intrinsics", "camera2lidar", "img_aug_matrix"):
        assert batch[name].shape == (2, 6, 4, 4)
    assert batch["lidar2ego"].shape == batch["lidar_aug_matrix"].shape == (2, 4, 4)
    assert [len(meta["token"]) for meta in batch["metas"]] == [32, 32]
    assert batch["metas"][0]["box_type_3d"](torch.zeros(1, 9), box_dim=9).tensor.shape == (1, 9)
    assert len(batch["gt_bboxes_3d"]) == len(batch["gt_labels_3d"]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_lie_in_page_locked_memory_where_cuda_is_in_use(train, workers):
    torch.zeros(1, device="cuda")
    batch = next(iter(FrameLoader(train, 2, workers)))
    assert batch["img"].data[0].is_pinned()
    assert all(points.is_pinned() for points in batch["points"].data[0])
    assert to_device(batch, "cuda")["img"].is_cuda


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(train, number):
    batches = iter(FrameLoader(train, 1, 1))
    next(batches)
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, number)
    for _ in range(3):
        next(batches)
    assert worker.is_alive()
    batches.close()
    worker.join(10)
    assert not worker.is_alive()


class Nested(torch.utils.data.Dataset):
    """Samples that no batch can be made of: text goes on for ever as a sequence of characters."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return self.sample


@pytest.mark.parametrize("sample", [{"token": ["text"]}, {"points": object()}])
def test_samples_that_make_no_batch_are_refused(sample):
    with pytest.raises(
        InputError, match=r"can't be joined into a batch .*: end it with DefaultFormatBundle3D and Coll"
    ):
        next(iter(FrameLoader(Nested(sample), 1, 0)))


def test_last_batch_may_be_smaller(tiny, golden):
    cfg = dataset_config(reference_config(golden), "test", tiny, tiny / "nuscenes_infos_train.pkl", **small_steps())
    loader = FrameLoader(build_dataset(cfg), 2, 0)
    assert len(loader) == 2
    assert [len(to_device(batch, "cpu")["points"]) for batch in loader] == [2, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_arrive_as_one_line(tmp_path, golden, workers):
    root = TinyNuScenes(tmp_path).save()
    create_data(root, "v1.0-mini", 10, 1, False)
    broken = next((root / "samples" / "CAM_BACK").glob("scene-0061_1*"))
    broken.unlink()
    cfg = dataset_config(reference_config(golden), "test", root, root / "nuscenes_infos_train.pkl", **small_steps())
    loaded = 0
    with pytest.raises(InputError) as caught:
        for _ in FrameLoader(build_dataset(cfg), 1, workers):
            loaded += 1
    assert loaded == 1
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert broken.name in str(caught.value)


# --- wrappers


def test_class_balanced_sampling_equals_mmdet3ds_where_all_classes_occur(tmp_path, golden):
    infos = many_infos(golden, {"a": 12})
    rng = np.random.default_rng(0)
    for info in infos:
        info["gt_names"] = [CLASSES[i] for i in rng.integers(0, 10, 69)]
        info["valid_flag"] = (rng.random(69) < 0.1).tolist()
    path = write_infos(tmp_path / "infos.json", infos)
    dataset = NuScenesDataset(path, object_classes=CLASSES, use_valid_flag=True)
    np.random.seed(3)
    ours = build_dataset({"type": "CBGSDataset", "dataset": dataset})
    np.random.seed(3)
    theirs = mmdet3d.datasets.dataset_wrappers.CBGSDataset(dataset)
    assert type(ours) is CBGSDataset
    assert ours.sample_indices == theirs.sample_indices
    assert len(ours.flag) == len(ours) > len(dataset)


def test_class_balanced_sampling_with_absent_classes(tmp_path, golden, caplog):
    one_frame = frames_without_files(tmp_path, golden, {"a": 1})
    assert set(CBGSDataset(one_frame).sample_indices) == {0}
    assert "no frame holds" in caplog.text
    info = reference_info(golden)
    for key in ("gt_boxes", "gt_names", "gt_velocity", "num_lidar_pts", "num_radar_pts", "valid_flag"):
        del info[key]
    test_split = NuScenesDataset(write_infos(tmp_path / "test.json", [info]), object_classes=CLASSES)
    assert CBGSDataset(test_split).sample_indices == [0]


def test_nested_and_joined_configs(tiny, golden):
    cfg = dataset_config(reference_config(golden), "test", tiny, tiny / "nuscenes_infos_train.pkl", **small_steps())
    repeated = build_dataset({"type": "RepeatDataset", "times": 3, "dataset": {"type": "CBGSDataset", "dataset": cfg}})
    assert len(repeated) == 3 * len(repeated.dataset)
    assert isinstance(frames_of(repeated), NuScenesDataset)
    joined = build_dataset([cfg, cfg])
    assert len(joined) == 2 * KEYFRAMES
    with pytest.raises(InputError, match="calibration needs one NuScenesDataset"):
        frames_of(joined)
    with pytest.raises(InputError, match=r"unknown dataset type 'NuscenesDataset'.*NuScenesDataset"):
        build_dataset({**cfg, "type": "NuscenesDataset"})


def test_epochs_reach_the_transforms(train):
    mask = next(t for t in frames_of(train).pipeline.transforms if type(t).__name__ == "GridMask")
    mask.fixed_prob, mask.final_prob = False, 0.6
    train.set_epoch(3)
    assert mask.prob == pytest.approx(0.3)


def test_frames_without_objects_are_replaced_in_training_only(tmp_path, golden):
    root = TinyNuScenes(tmp_path).save()
    create_data(root, "v1.0-mini", 10, 1, False)
    cfg = dataset_config(reference_config(golden), "train", root, root / "nuscenes_infos_train.pkl", **small_steps())
    dataset = build_dataset(cfg)
    dataset.data_infos[0].ground_truth.valid[:] = False
    np.random.seed(0)
    token = dataset.data_infos[0].token
    assert dataset[0]["metas"].data["token"] != token
    assert dataset.prepare(0)["metas"].data["token"] == token
    for frame in dataset.data_infos:
        frame.ground_truth.valid[:] = False
    with pytest.raises(InputError, match="frames in a row hold no object of car, truck"):
        dataset[0]
    dataset.test_mode = True
    assert dataset[0]["metas"].data["token"] == token


# --- calibration


def test_chosen_frames_are_a_function_of_the_seed(tmp_path, golden):
    dataset = frames_without_files(tmp_path, golden, {"a": 20, "b": 20, "c": 20})
    chosen = calibration_frames(dataset, 15, seed=1)
    random.seed(9)
    np.random.seed(9)
    assert calibration_frames(dataset, 15, seed=1) == chosen
    assert calibration_frames(CBGSDataset(dataset), 15, seed=1) == chosen
    assert calibration_frames(dataset, 15, seed=2) != chosen


def test_chosen_frames_are_spread_over_scenes_and_time(tmp_path, golden):
    dataset = frames_without_files(tmp_path, golden, {"a": 20, "b": 20, "c": 3, "d": 20})

    def scenes(indices):
        return Counter(dataset.data_infos[i].scene for i in indices)

    for seed in range(5):
        assert set(scenes(calibration_frames(dataset, 2, seed)).values()) == {1}
        chosen = calibration_frames(dataset, 27, seed)
        assert len(set(chosen)) == 27
        assert scenes(chosen) == {"a": 8, "b": 8, "c": 3, "d": 8}
        assert len(scenes(chosen[:4])) == 4
        position = sorted(i for i in chosen if dataset.data_infos[i].scene == "a")
        assert max(np.diff(position)) <= 5  # 8 of 20: one in each stretch of 2.5
        assert sorted(scenes(calibration_frames(dataset, 13, seed)).values()) in ([3, 3, 3, 4], [2, 3, 4, 4])
    assert sorted(calibration_frames(dataset, 500, 0)) == list(range(63))
    with pytest.raises(InputError, match="at least one frame, not 0"):
        calibration_frames(dataset, 0, 0)


def test_batches_do_not_depend_on_workers_or_on_the_frames_before(train):
    indices = [2, 0, 1]

    def batches(workers, **options):
        loader = calibration_loader(train, options.pop("indices", indices), workers=workers, seed=5, **options)
        return [to_device(batch, "cpu") for batch in loader]

    alone = batches(0)
    tokens = [frames_of(train).data_infos[i].token for i in indices]
    assert [batch["metas"][0]["token"] for batch in alone] == tokens
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    for a, b in zip(alone, batches(2), strict=True):
        assert_equal_batches(a, b)
    assert_equal_batches(batches(0, indices=[0])[0], alone[1])
    pairs = batches(1, batch_size=2)
    torch.testing.assert_close(pairs[0]["img"], torch.cat([alone[0]["img"], alone[1]["img"]]), rtol=0, atol=0)
    again = [to_device(batch, "cpu") for batch in calibration_loader(train, indices, seed=6)]
    assert not torch.equal(again[0]["lidar_aug_matrix"], alone[0]["lidar_aug_matrix"])


def test_calibration_leaves_the_global_random_state_alone(train):
    frames = calibration_loader(train, [0], seed=5).dataset
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    frames[0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def with_root(cfg, root):
    """The resolved config, its data moved to `root` and its pipelines fitted to small images."""

    def moved(item):
        if isinstance(item, dict):
            return {key: moved(value) for key, value in item.items()}
        if isinstance(item, list):
            return [moved(value) for value in item]
        return item.replace("data/nuscenes/", f"{root}/") if isinstance(item, str) else item

    cfg = moved(cfg)
    for pipeline in (cfg["data"]["train"]["dataset"]["pipeline"], cfg["data"]["test"]["pipeline"]):
        for step in pipeline:
            step.update(small_steps().get(step["type"]) or {})
    return cfg


def test_calibration_takes_either_pipeline(tiny, golden):
    cfg = with_root(reference_config(golden), tiny)
    test, train = calibration_dataset(cfg, "test"), calibration_dataset(cfg, "train")
    assert len(frames_of(test)) == len(frames_of(train)) == KEYFRAMES
    batch = to_device(next(iter(calibration_loader(test, [1]))), "cpu")
    assert torch.equal(batch["lidar_aug_matrix"][0], torch.eye(4))
    lags = batch["points"][0][:, 4].unique()
    np.testing.assert_allclose(lags, np.arange(4) / 6, atol=1e-5)
    batch = to_device(next(iter(calibration_loader(train, [1]))), "cpu")
    assert not torch.equal(batch["lidar_aug_matrix"][0], torch.eye(4))
    names = [type(t).__name__ for t in frames_of(train).pipeline.transforms]
    assert "ObjectPaste" in names
    assert "LoadBEVSegmentation" not in names
    assert cfg == with_root(reference_config(golden), tiny)


def test_missing_database_names_both_ways_out(tmp_path, golden):
    root = TinyNuScenes(tmp_path).save()
    create_data(root, "v1.0-mini", 10, 1, False)
    cfg = with_root(reference_config(golden), root)
    with pytest.raises(InputError) as caught:
        calibration_dataset(cfg, "train")
    message = str(caught.value)
    assert "nuscenes_dbinfos_train.pkl" in message
    assert "python -m bevfusion.create_data" in message
    assert "--calib-pipeline test" in message
    assert len(frames_of(calibration_dataset(cfg, "test"))) == KEYFRAMES


def test_missing_data_root_names_the_way_out(tmp_path, golden):
    cfg = with_root(reference_config(golden), tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere/nuscenes_infos_train.pkl does not exist.*bevfusion.create_data"):
        calibration_dataset(cfg, "test")


def test_a_data_set_without_a_length_is_refused(tiny, golden):
    cfg = with_root(reference_config(golden), tiny)
    cfg["data"]["train"] = {"type": "RepeatDataset", "times": [2], "dataset": cfg["data"]["train"]}
    with pytest.raises(InputError, match=r"the calibration frames of the config can't be opened .*TypeError"):
        calibration_dataset(cfg, "test")
