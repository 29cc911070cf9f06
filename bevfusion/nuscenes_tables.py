"""Open nuScenes' tables with the official devkit, and say in one line what is wrong when they can't be read."""

import json
from collections.abc import Mapping
from pathlib import Path

from nuscenes import NuScenes

from bevfusion.errors import InputError

VERSIONS = ("v1.0-mini", "v1.0-trainval", "v1.0-test")
TABLES = (
    *("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map"),
    *("sample", "sample_annotation", "sample_data", "scene", "sensor", "visibility"),
)
# Table -> field -> table its tokens lie in; only the references that the conversion and the metrics follow.
REFERENCES = {
    "instance": {"category_token": "category"},
    "calibrated_sensor": {"sensor_token": "sensor"},
    "scene": {"log_token": "log"},
    "sample": {"scene_token": "scene"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
    },
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "attribute_tokens": "attribute",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
}


def open_nuscenes(root: str | Path, version: str) -> NuScenes:
    """Load the tables of `root/version` with the official devkit, with every token that we follow checked.

    Raises:
        InputError: the folder is not nuScenes, a table is missing or broken, or a token points nowhere.
    """
    folder = _version_folder(Path(root), version)
    missing = [name for name in TABLES if not (folder / f"{name}.json").is_file()]
    if missing:
        raise InputError(f"{folder} is not a complete nuScenes version folder: {missing[0]}.json is missing")
    try:
        nuscenes = NuScenes(version, str(root), verbose=False)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        check_references({name: _read_table(folder / f"{name}.json") for name in TABLES}, folder)
        raise InputError(f"the nuScenes devkit can't load {folder}: {error!r}") from error
    except Exception as error:  # the devkit asserts, and raises plain Exception
        raise InputError(f"the nuScenes devkit can't load {folder}: {error}") from error
    check_references({name: getattr(nuscenes, name) for name in TABLES}, folder)
    return nuscenes


def check_references(tables: Mapping[str, list[dict]], folder: Path) -> None:
    """Refuse tables (name -> records) of `folder` in which a record names a token that does not exist.

    Raises:
        InputError: names the table, the record, the field and the token.
    """
    tokens = {name: {record.get("token") for record in records} for name, records in tables.items()}
    for name, fields in REFERENCES.items():
        for record in tables[name]:
            for field, target in fields.items():
                if field not in record:
                    raise InputError(f"{folder / name}.json: record {record.get('token')!r} has no field {field!r}")
                value = record[field]
                if value == "" and field in ("prev", "next"):  # the ends of a chain
                    continue
                for token in value if isinstance(value, list) else [value]:
                    if token not in tokens[target]:
                        raise InputError(
                            f"{folder / name}.json: {field} of record {record.get('token')!r} names {token!r}, "
                            f"which is not in {target}.json; download or extract the tables again"
                        )


def _version_folder(root: Path, version: str) -> Path:
    """Path of the folder with the tables; raises InputError with what there is instead."""
    if not root.is_dir():
        raise InputError(f"data root {root} does not exist; --root names the folder that holds {version}/ and samples/")
    if not (root / version).is_dir():
        found = ", ".join(sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())) or "no v1.0-* folder"
        raise InputError(f"{root} has no nuScenes version {version} (found: {found})")
    return root / version


def _read_table(path: Path) -> list[dict]:
    """Records of one table; raises InputError if it is not a JSON list of records."""
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); download or extract the tables again") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path} is not a nuScenes table: a list of records is expected")
    return records
