"""The thirteen tables of nuScenes v1.0, made from the records of all keyframes."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import md5
from itertools import pairwise

from bevfusion.synthetic.capture import map_file
from bevfusion.synthetic.options import Options, log_name, start_of
from bevfusion.synthetic.rig import SENSORS

Rows = dict[str, list[dict]]

CATEGORIES = {
    "human.pedestrian.adult": "Adult.",
    "human.pedestrian.child": "Child.",
    "human.pedestrian.wheelchair": "Person in a wheelchair.",
    "human.pedestrian.stroller": "Pushchair with a child.",
    "human.pedestrian.personal_mobility": "Person on a small vehicle such as a skateboard or scooter.",
    "human.pedestrian.police_officer": "Police officer.",
    "human.pedestrian.construction_worker": "Construction worker.",
    "animal": "Animal.",
    "vehicle.car": "Car, van or jeep.",
    "vehicle.motorcycle": "Motorcycle, with its rider if there is one.",
    "vehicle.bicycle": "Bicycle, with its rider if there is one.",
    "vehicle.bus.bendy": "Bus of two or more sections.",
    "vehicle.bus.rigid": "Bus of one section.",
    "vehicle.truck": "Truck or tractor of a trailer.",
    "vehicle.construction": "Construction machine.",
    "vehicle.emergency.ambulance": "Ambulance.",
    "vehicle.emergency.police": "Police vehicle.",
    "vehicle.trailer": "Trailer.",
    "movable_object.barrier": "Temporary road barrier.",
    "movable_object.trafficcone": "Traffic cone.",
    "movable_object.pushable_pullable": "Object that a person can push or pull.",
    "movable_object.debris": "Object left on the road.",
    "static_object.bicycle_rack": "Bicycle rack.",
}
ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.stopped": "Vehicle stands but is in traffic.",
    "vehicle.parked": "Vehicle is parked.",
    "cycle.with_rider": "There is a rider.",
    "cycle.without_rider": "There is no rider.",
    "pedestrian.sitting_lying_down": "Person sits or lies.",
    "pedestrian.standing": "Person stands.",
    "pedestrian.moving": "Person moves.",
}
VISIBILITIES = {"1": (0.0, "v0-40"), "2": (0.4, "v40-60"), "3": (0.6, "v60-80"), "4": (0.8, "v80-100")}


def token(*names: str | int) -> str:
    """A token of 32 hexadecimal digits that depends on the names alone."""
    return md5("/".join(str(n) for n in names).encode(), usedforsecurity=False).hexdigest()


def build_tables(options: Options, scenes: Iterable[tuple[str, list[dict]]]) -> Rows:
    """All tables for (scene name, records of its keyframes in order)."""
    tables: Rows = {"map": [], "log": [], "scene": [], "sample": [], "sample_data": [], "ego_pose": []}
    tables |= {"calibrated_sensor": [], "instance": [], "sample_annotation": []}
    tables["category"] = [{"token": token("category", n), "name": n, "description": d} for n, d in CATEGORIES.items()]
    tables["attribute"] = [{"token": token("attribute", n), "name": n, "description": d} for n, d in ATTRIBUTES.items()]
    tables["visibility"] = [
        {"token": k, "level": level, "description": f"visibility of whole object is {level[1:].replace('-', ' to ')}%"}
        for k, (_, level) in VISIBILITIES.items()
    ]
    tables["sensor"] = [
        {"token": token("sensor", s.channel), "channel": s.channel, "modality": "camera" if s.intrinsic else "lidar"}
        for s in SENSORS
    ]
    for name, records in scenes:
        world = (options.version, options.seed, name)
        _add_log(tables, world, name)
        _add_calibration(tables, world, options)
        _add_samples(tables, world, name, records)
        _add_sample_data(tables, world, records, options)
        _add_annotations(tables, world, records)
    return tables


def _add_log(tables: Rows, world: tuple, name: str) -> None:
    tables["log"].append(
        {
            "token": token(*world, "log"),
            "logfile": log_name(name),
            "vehicle": "n900",
            "date_captured": f"{datetime.fromtimestamp(start_of(name), UTC):%Y-%m-%d}",
            "location": "synthetic-town",
        }
    )
    tables["map"].append(
        {
            "category": "semantic_prior",
            "token": token(*world, "map"),
            "filename": map_file(name),
            "log_tokens": [token(*world, "log")],
        }
    )


def _add_calibration(tables: Rows, world: tuple, options: Options) -> None:
    for sensor in SENSORS:
        tables["calibrated_sensor"].append(
            {
                "token": token(*world, "calibration", sensor.channel),
                "sensor_token": token("sensor", sensor.channel),
                "translation": list(sensor.translation),
                "rotation": list(sensor.rotation),
                "camera_intrinsic": sensor.matrix(options.image_size).tolist() if sensor.intrinsic else [],
            }
        )


def _link(rows: list[dict]) -> None:
    """Set `prev` and `next` of rows that follow one another."""
    for row in rows:
        row["prev"] = row["next"] = ""
    for before, after in pairwise(rows):
        before["next"], after["prev"] = after["token"], before["token"]


def _add_samples(tables: Rows, world: tuple, name: str, records: list[dict]) -> None:
    samples = []
    for k, record in enumerate(records):
        (timestamp,) = (s["timestamp"] for s in record["shots"] if s["is_key_frame"] and s["channel"] == "LIDAR_TOP")
        samples.append(
            {"token": token(*world, "sample", k), "timestamp": timestamp, "scene_token": token(*world, "scene")}
        )
    _link(samples)
    tables["sample"] += samples
    counts = defaultdict(int)
    for row in records[0]["objects"]:
        counts[row["category"].rpartition(".")[2]] += 1
    light = "dusk" if records[0]["dusk"] else "day"
    tables["scene"].append(
        {
            "token": token(*world, "scene"),
            "log_token": token(*world, "log"),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0]["token"],
            "last_sample_token": samples[-1]["token"],
            "name": name,
            "description": f"Synthetic street, {light}; " + ", ".join(f"{n} {c}" for c, n in sorted(counts.items())),
        }
    )


def _add_sample_data(tables: Rows, world: tuple, records: list[dict], options: Options) -> None:
    chains = defaultdict(list)
    for k, record in enumerate(records):
        for shot in record["shots"]:
            channel, camera = shot["channel"], shot["channel"] != "LIDAR_TOP"
            key = token(*world, "data", channel, shot["timestamp"])
            chains[channel].append(
                {
                    "token": key,
                    "sample_token": token(*world, "sample", k),
                    "ego_pose_token": key,
                    "calibrated_sensor_token": token(*world, "calibration", channel),
                    "timestamp": shot["timestamp"],
                    "fileformat": "jpg" if camera else "pcd",
                    "is_key_frame": shot["is_key_frame"],
                    "height": options.image_size[1] if camera else 0,
                    "width": options.image_size[0] if camera else 0,
                    "filename": shot["filename"],
                }
            )
            tables["ego_pose"].append(
                {
                    "token": key,
                    "timestamp": shot["timestamp"],
                    "rotation": shot["ego_rotation"],
                    "translation": shot["ego_translation"],
                }
            )
    for rows in chains.values():
        _link(rows)
        tables["sample_data"] += rows


def _add_annotations(tables: Rows, world: tuple, records: list[dict]) -> None:
    """Annotate every object from the keyframe where it is first seen by any sensor to the one where it is last seen."""
    tracks = defaultdict(list)
    for k, record in enumerate(records):
        for row in record["objects"]:
            tracks[row["object"]].append((k, row))
    for number, track in sorted(tracks.items()):
        seen = [k for k, row in track if row["points"] or row["visible"]]
        track = [(k, row) for k, row in track if seen and seen[0] <= k <= seen[-1]]
        if not track:
            continue
        annotations = [_annotation(world, number, k, row) for k, row in track]
        _link(annotations)
        tables["sample_annotation"] += annotations
        tables["instance"].append(
            {
                "token": token(*world, "instance", number),
                "category_token": token("category", track[0][1]["category"]),
                "nbr_annotations": len(annotations),
                "first_annotation_token": annotations[0]["token"],
                "last_annotation_token": annotations[-1]["token"],
            }
        )


def _annotation(world: tuple, number: int, k: int, row: dict) -> dict:
    share = row["visible"] / max(row["alone"], 1)
    return {
        "token": token(*world, "annotation", number, k),
        "sample_token": token(*world, "sample", k),
        "instance_token": token(*world, "instance", number),
        "visibility_token": max(key for key, (least, _) in VISIBILITIES.items() if share >= least),
        "attribute_tokens": [token("attribute", row["attribute"])] if row["attribute"] else [],
        "translation": row["translation"],
        "size": row["size"],
        "rotation": row["rotation"],
        "num_lidar_pts": row["points"],
        "num_radar_pts": 0,
    }
