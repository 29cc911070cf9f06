"""A street that is being filled: kinds of objects, places taken, buildings and clutter; nothing touches another."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from bevfusion.synthetic import props, road_users, vehicles
from bevfusion.synthetic.geometry import Part, Solids, solids_from
from bevfusion.synthetic.motion import Motion, boxes_overlap
from bevfusion.synthetic.road import SETBACK, Road
from bevfusion.synthetic.scene import Actor

Shape = Callable[[vehicles.Size, np.random.Generator], list[Part]]
CLEARANCE = 0.25  # metres between any two things, at any time


@dataclass(frozen=True)
class Kind:
    """A kind of annotated object: category, shape, and size (length, width, height) with its spread (both metres)."""

    category: str
    shape: Shape
    size: tuple[float, float, float]
    spread: tuple[float, float, float]
    parked: bool = False
    rider: bool = False


def _cycle(shape: Callable[..., list[Part]], rider: bool) -> Shape:
    return lambda size, rng: shape(size, rng, rider=rider)


KINDS = {
    "car": Kind("vehicle.car", vehicles.car, (4.6, 1.92, 1.68), (0.4, 0.1, 0.18)),
    "truck": Kind("vehicle.truck", vehicles.truck, (7.2, 2.5, 3.0), (1.0, 0.12, 0.35)),
    "bus": Kind("vehicle.bus.rigid", vehicles.bus, (11.0, 2.85, 3.4), (0.9, 0.1, 0.2)),
    "trailer": Kind("vehicle.trailer", vehicles.trailer, (11.0, 2.75, 3.7), (1.3, 0.12, 0.2)),
    "construction": Kind("vehicle.construction", vehicles.construction_vehicle, (6.5, 2.75, 3.1), (0.6, 0.15, 0.2)),
    "pedestrian": Kind("human.pedestrian.adult", road_users.pedestrian, (0.72, 0.68, 1.75), (0.12, 0.06, 0.1)),
    "child": Kind("human.pedestrian.child", road_users.pedestrian, (0.56, 0.62, 1.3), (0.06, 0.04, 0.1)),
    "worker": Kind(
        "human.pedestrian.construction_worker",
        lambda size, rng: road_users.pedestrian(size, rng, worker=True),
        (0.72, 0.7, 1.8),
        (0.1, 0.05, 0.06),
    ),
    "cyclist": Kind(
        "vehicle.bicycle", _cycle(road_users.bicycle, True), (1.75, 0.62, 1.75), (0.08, 0.06, 0.08), rider=True
    ),
    "bicycle": Kind("vehicle.bicycle", _cycle(road_users.bicycle, False), (1.72, 0.58, 1.1), (0.08, 0.05, 0.05)),
    "motorcyclist": Kind(
        "vehicle.motorcycle", _cycle(road_users.motorcycle, True), (2.15, 0.8, 1.68), (0.1, 0.06, 0.06), rider=True
    ),
    "motorcycle": Kind("vehicle.motorcycle", _cycle(road_users.motorcycle, False), (2.1, 0.78, 1.2), (0.1, 0.05, 0.06)),
    "cone": Kind("movable_object.trafficcone", road_users.traffic_cone, (0.44, 0.44, 0.95), (0.04, 0.0, 0.14)),
    "barrier": Kind("movable_object.barrier", road_users.barrier, (0.55, 2.3, 1.02), (0.06, 0.3, 0.08)),
}


@dataclass
class Street:
    """A street being filled; places that are taken are known at `times` (T,) in seconds."""

    road: Road
    times: np.ndarray
    rng: np.random.Generator
    actors: list[Actor] = field(default_factory=list)
    shapes: list[list[Part]] = field(default_factory=list)
    things: list[tuple[Motion, list[Part]]] = field(default_factory=list)
    centres: np.ndarray = field(init=False)
    yaws: np.ndarray = field(init=False)
    halves: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))

    def __post_init__(self) -> None:
        self.centres, self.yaws = np.empty((0, len(self.times), 2)), np.empty((0, len(self.times)))

    def reserve(self, motion: Motion, length: float, width: float, clearance: float = CLEARANCE) -> bool:
        """Take a place for a moving rectangle if it never overlaps another; says whether it did."""
        centre, yaw = motion.pose(self.road, self.times)
        half = np.array([length, width]) / 2 + clearance / 2
        # Circles around the rectangles rule most of them out.
        reach = np.hypot(*half) + np.hypot(self.halves[:, 0], self.halves[:, 1])
        gap = self.centres - centre
        near = np.flatnonzero((gap**2).sum(axis=-1).min(axis=1) < reach**2)
        if len(near) and boxes_overlap(centre, yaw, half, self.centres[near], self.yaws[near], self.halves[near]).any():
            return False
        self.centres = np.concatenate([self.centres, centre[None]])
        self.yaws = np.concatenate([self.yaws, np.broadcast_to(yaw, (1, len(self.times)))])
        self.halves = np.concatenate([self.halves, half[None]])
        return True

    def size(self, kind: str) -> tuple[float, float, float]:
        """A random size (length, width, height) for a kind; feet that are square stay square."""
        spec = KINDS[kind]
        size = np.array(spec.size) + self.rng.uniform(-1, 1, 3) * spec.spread
        if kind == "cone":
            size[1] = size[0]
        return tuple(float(v) for v in size.round(3))

    def add(
        self, kind: str, motion: Motion, *, parked: bool = False, size: tuple[float, float, float] | None = None
    ) -> bool:
        """Place an annotated object if there is room; says whether there was."""
        spec = KINDS[kind]
        size = size or self.size(kind)
        if not self.reserve(motion, size[0], size[1], 0.8 if motion.speed > 2 else CLEARANCE):
            return False
        self.shapes.append(spec.shape(size, self.rng))
        self.actors.append(Actor(spec.category, size, motion, parked, spec.rider))
        return True

    def put(self, shape: Shape, size: tuple[float, float, float], s: float, d: float, facing: float) -> bool:
        """Place something that is not annotated if there is room; `facing` is its direction in road coordinates."""
        motion = Motion(s, d, facing)
        if not self.reserve(motion, size[0], size[1]):
            return False
        self.things.append((motion, shape(size, self.rng)))
        return True

    def solids(self) -> tuple[Solids, Solids]:
        """Solids of all actors in their own frames, and of all things in global coordinates."""
        moving = solids_from(*_with_owners(self.shapes))
        static = solids_from(*_with_owners([parts for _, parts in self.things]))
        poses = [motion.pose(self.road, 0.0) for motion, _ in self.things]
        xyz, yaw = np.array([[*xy, 0.0] for xy, _ in poses]), np.array([yaw for _, yaw in poses])
        static = static.placed(xyz[static.owner], yaw[static.owner])
        return moving, replace(static, owner=-1 - static.owner)


def _with_owners(shapes: list[list[Part]]) -> tuple[list[Part], list[int]]:
    parts = [part for shape in shapes for part in shape]
    return parts, [i for i, shape in enumerate(shapes) for _ in shape]


def _clear_of_crossing(road: Road, s: float, margin: float = 0.0) -> bool:
    return abs(s - road.crossing) > road.cross_half + 3.5 + margin


def build_front(street: Street, span: tuple[float, float]) -> None:
    """Buildings along both sides and along the cross street, with a few gaps where trees stand."""
    road, rng = street.road, street.rng
    for side in (-1, 1):
        s = span[0]
        while s < span[1]:
            width, depth, height = rng.uniform(9, 22), rng.uniform(8, 12), rng.uniform(5, 20)
            middle = s + width / 2
            d = side * (road.front + rng.uniform(0.5, 2.5) + depth / 2)
            if _clear_of_crossing(road, middle, width / 2 + 1.0) and rng.random() < 0.85:
                street.put(props.building, (depth, width, height), middle, d, -side * np.pi / 2)
            else:
                for _ in range(3):
                    at = rng.uniform(road.front + 2, SETBACK)
                    _tree(street, rng.uniform(s, s + width), side * at)
            s += width + rng.uniform(0.3, 3.0)


def _tree(street: Street, s: float, d: float) -> bool:
    crown, height = street.rng.uniform(1.8, 2.8), street.rng.uniform(5.0, 8.0)
    # The crown is above the people, and off the carriageway: only the trunk needs room.
    motion = Motion(s, d, 0.0)
    if not _clear_of_crossing(street.road, s) or not street.reserve(motion, 0.4, 0.4):
        return False
    street.things.append((motion, props.tree((crown, crown, height), street.rng)))
    return True


def furnish(street: Street, span: tuple[float, float]) -> None:
    """Lamp posts, trees, signs, bins, bollards and planters along the kerb."""
    road, rng = street.road, street.rng
    for side in (-1, 1):
        for s in np.arange(span[0], span[1], 27.0) + rng.uniform(0, 9):
            if _clear_of_crossing(road, s):
                street.put(props.lamp_post, (2.2, 0.2, 7.5), s, side * (road.kerb + 0.5), -side * np.pi / 2)
        for s in np.arange(span[0], span[1], 7.0):
            at, d = s + rng.uniform(0, 5), side * (road.kerb + rng.uniform(0.5, 0.8))
            if not _clear_of_crossing(road, at):
                continue
            choice = rng.choice(
                ["tree", "bin", "bollard", "planter", "sign", "none"], p=[0.2, 0.2, 0.2, 0.16, 0.1, 0.14]
            )
            _furniture(street, str(choice), at, d, side)


def _furniture(street: Street, choice: str, s: float, d: float, side: int) -> None:
    rng = street.rng
    across = -side * np.pi / 2
    if choice == "tree":
        _tree(street, s, side * (street.road.kerb + 1.7))
    elif choice == "bin":
        street.put(props.bin_, (0.5, 0.5, float(rng.uniform(0.85, 1.15))), s, d, across)
    elif choice == "bollard":
        for i in range(3):
            street.put(props.bollard, (0.34, 0.34, float(rng.uniform(0.8, 1.0))), s + 1.6 * i, d, across)
    elif choice == "planter":
        size = (0.6, float(rng.uniform(2.0, 2.6)), float(rng.uniform(0.9, 1.15)))
        street.put(props.planter, size, s, d, across)
    elif choice == "sign":
        street.put(props.sign, (0.12, 0.6, float(rng.uniform(2.4, 3.0))), s, d, np.pi if side < 0 else 0.0)
