"""Write BEVFusion's info files and ground-truth database from nuScenes' own tables.

`python -m bevfusion.create_data --root data/nuscenes --version v1.0-mini`
"""

import logging
import os
import pickle
from pathlib import Path

from nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes
from tqdm import tqdm

from bevfusion.create_data.database import FOLDER, write_database
from bevfusion.create_data.infos import SampleConverter
from bevfusion.errors import InputError
from bevfusion.nuscenes_tables import open_nuscenes

SPLITS = {
    "v1.0-mini": {"train": "mini_train", "val": "mini_val"},
    "v1.0-trainval": {"train": "train", "val": "val"},
    "v1.0-test": {"test": "test"},
}
logger = logging.getLogger(__name__)


def create_data(
    root: str | Path, version: str, max_sweeps: int = 10, workers: int = 1, database: bool = True
) -> dict[str, int]:
    """Write `nuscenes_infos_<split>.pkl` for each split of `version`, and the ground-truth database of the train split.

    Every file is complete or not there, and equal input gives equal bytes.

    Args:
        max_sweeps: LiDAR sweeps before each keyframe, at most.
        workers: threads that cut out objects.
        database: whether to write the ground-truth database, which only ObjectPaste needs.

    Returns:
        path below `root` -> number of frames (info files), or of objects (database).

    Raises:
        InputError: `root` is not nuScenes, or its tables or files are broken or incomplete.
    """
    root = Path(root)
    infos = convert(open_nuscenes(root, version), version, max_sweeps)
    if not any(infos.values()):
        raise InputError(f"no scene of {version}'s official splits has its LiDAR files under {root}")
    written = {}
    for split, entries in infos.items():
        name = f"nuscenes_infos_{split}.pkl"
        _write_pickle(root / name, {"infos": entries, "metadata": {"version": version}})
        written[name] = len(entries)
    if database and "train" in infos:
        objects = write_database(root, infos["train"], workers)
        _write_pickle(root / "nuscenes_dbinfos_train.pkl", objects)
        written[f"{FOLDER}, nuscenes_dbinfos_train.pkl"] = sum(map(len, objects.values()))
    return written


def convert(nuscenes: NuScenes, version: str, max_sweeps: int = 10) -> dict[str, list[dict]]:
    """Info entries of every sample of `nuscenes`, by split ('train', 'val' or 'test'), in the sample table's order."""
    converter = SampleConverter(nuscenes, max_sweeps, with_boxes=version != "v1.0-test")
    scene_names = create_splits_scenes()
    splits = {split: set(scene_names[official]) for split, official in SPLITS[version].items()}
    scenes = {scene["token"]: scene["name"] for scene in nuscenes.scene if converter.is_available(scene)}
    if len(scenes) < len(nuscenes.scene):
        absent = len(nuscenes.scene) - len(scenes)
        logger.warning("%d of %d scenes have no files here and are left out", absent, len(nuscenes.scene))
    infos = {split: [] for split in splits}
    for sample in tqdm(nuscenes.sample, "samples", unit="sample", disable=None):
        name = scenes.get(sample["scene_token"])
        for split, members in splits.items():
            if name in members:
                infos[split].append(converter(sample))
    return infos


def _write_pickle(path: Path, content: object) -> None:
    """Write a pickle (protocol 4) so that `path` never holds half a file."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(pickle.dumps(content, protocol=4))
    os.replace(partial, path)
