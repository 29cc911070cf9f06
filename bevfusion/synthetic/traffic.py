"""What happens on a street: work zones, parked and driving vehicles, people on foot and on cycles."""

import numpy as np

from bevfusion.synthetic import props
from bevfusion.synthetic.motion import Motion
from bevfusion.synthetic.population import Street

PARKED = {"car": 0.34, "truck": 0.10, "bus": 0.11, "trailer": 0.11, "motorcycle": 0.09, "gap": 0.25}
DRIVING = {"car": 0.46, "truck": 0.11, "bus": 0.20, "trailer": 0.11, "motorcyclist": 0.09, "construction": 0.03}


def _draw(rng: np.random.Generator, table: dict[str, float]) -> str:
    return str(rng.choice(list(table), p=list(table.values())))


def heading(side: int) -> float:
    """Direction of traffic in road coordinates on a side: -1 drives along +s."""
    return 0.0 if side < 0 else np.pi


def work_zones(street: Street, span: tuple[float, float]) -> None:
    """Every forty metres or so a zone on the parking and cycle lanes, on alternating sides."""
    rng, road = street.rng, street.road
    side = int(rng.choice([-1, 1]))
    s = span[0] + rng.uniform(0, 20)
    while s < span[1]:
        length = rng.uniform(16, 24)
        if abs(s + length / 2 - road.crossing) > road.cross_half + 4 + length / 2:
            _work_zone(street, s, s + length, side)
        s += length + rng.uniform(14, 28)
        side = -side


def _work_zone(street: Street, start: float, end: float, side: int) -> None:
    """Machines inside, barriers along the traffic, cones at both ends, workers, and sometimes a skip or a truck."""
    rng, road = street.rng, street.road
    inner = 2 * road.lane + 0.1
    middle = (inner + 0.8 + road.kerb) / 2
    machines = 2 if end - start > 20 else 1
    for i in range(machines):
        s = start + (i + 0.5) * (end - start) / machines + rng.uniform(-1, 1)
        turn = rng.normal(0, 0.12) + (np.pi if rng.random() < 0.5 else 0)
        street.add("construction", Motion(s, side * middle, turn), parked=bool(rng.random() < 0.5))
    for s in np.arange(start + 2.6, end - 2.0, 2.9):
        if rng.random() < 0.85:
            facing = -side * np.pi / 2 + rng.normal(0, 0.05)
            street.add("barrier", Motion(s, side * (inner + 0.3), facing))
    for edge, sign in ((start, 1), (end, -1)):
        for i in range(4):
            d = road.kerb - 0.5 - i * (road.kerb - inner - 0.7) / 3.0
            street.add("cone", Motion(edge + sign * (0.45 * i + rng.uniform(-0.15, 0.15)), side * d, 0.0))
    for _ in range(3):
        at = Motion(rng.uniform(start, end), side * rng.uniform(inner + 1, road.kerb + 1), rng.uniform(0, 6.28))
        street.add("worker", at)
    if rng.random() < 0.5:
        street.put(props.skip, (4.2, 1.9, 1.7), rng.uniform(start + 3, end - 3), side * (road.kerb - 1.1), 0.0)


def closed_bays(street: Street, span: tuple[float, float]) -> None:
    """Parking bays put to other use: fenced off with barriers and cones, or left to cycles, or to people who talk."""
    rng, road = street.rng, street.road
    for side in (-1, 1):
        for start in np.arange(span[0], span[1], 24.0):
            s, use = start + rng.uniform(0, 14), str(rng.choice(["fence", "cycles", "people", "none"]))
            d = road.centre(side, "parking")
            if abs(s + 4 - road.crossing) < road.cross_half + 10:
                continue
            if use == "fence":
                edge = side * (road.kerb - road.parking + 0.35)
                for i in range(3):
                    street.add("barrier", Motion(s + 1.6 + 2.9 * i, edge, -side * np.pi / 2 + rng.normal(0, 0.04)))
                for at, across in ((-0.4, -0.8), (-0.4, 0.5), (9.5, -0.8), (9.5, 0.5)):
                    street.add("cone", Motion(s + at, d + across, 0.0))
            elif use == "cycles":
                kind, facing = str(rng.choice(["bicycle", "motorcycle"])), rng.choice([0.6, np.pi / 2, 2.5])
                for i in range(int(rng.integers(3, 6))):
                    street.add(kind, Motion(s + 1.15 * i, d, facing + rng.normal(0, 0.06)))
            elif use == "people":
                for i in range(3):
                    street.add("pedestrian", Motion(s + 1.1 * i, d + rng.uniform(-0.8, 0.8), rng.uniform(0, 6.28)))


def parked(street: Street, span: tuple[float, float]) -> None:
    """A row of parked vehicles on either side, cones behind some of the trucks."""
    rng, road = street.rng, street.road
    for side in (-1, 1):
        s = span[0]
        while s < span[1]:
            kind = _draw(rng, PARKED)
            if kind == "gap":
                s += rng.uniform(3, 8)
                continue
            size = street.size(kind)
            room = size[0] + rng.uniform(0.8, 2.5)
            at = s + room / 2
            d = road.centre(side, "parking") + rng.normal(0, 0.08)
            direction = heading(side) + rng.normal(0, 0.02)
            if kind == "motorcycle":
                direction += rng.uniform(0.6, 1.2)
            if abs(at - road.crossing) > road.cross_half + 4 + size[0] / 2:
                placed = street.add(kind, Motion(at, d, direction), parked=True, size=size)
                if placed and kind in ("truck", "trailer") and rng.random() < 0.4:
                    _cones_behind(street, at - np.cos(heading(side)) * (size[0] / 2 + 0.6), d)
            s += room


def _cones_behind(street: Street, s: float, d: float) -> None:
    for offset in (-0.9, 0.0, 0.9):
        street.add("cone", Motion(s, d + offset, 0.0))


def driving(street: Street, ego: Motion, duration: float) -> None:
    """Traffic in all four lanes, each lane with its own pace; a trailer follows its tractor."""
    rng, road = street.rng, street.road
    for side in (-1, 1):
        for lane in (0, 1):
            d = road.centre(side, lane)
            same = abs(d - ego.d) < 0.5
            pace = ego.speed if same else rng.uniform(4, 10)
            sign = np.cos(heading(side))
            slip = abs(pace * sign - ego.speed) * duration
            for _ in range(round((110 + slip) / 28)):
                t = rng.uniform(0, duration)
                s = ego.s + ego.distance(t) + rng.uniform(-52, 52) - sign * pace * t
                brake = ego.brake_at if same else np.inf
                _drive(street, _draw(rng, DRIVING), Motion(float(s), d, heading(side), pace, brake, ego.brake))


def _drive(street: Street, kind: str, motion: Motion) -> None:
    rng = street.rng
    if kind == "construction":
        motion = Motion(motion.s, motion.d, motion.direction, min(motion.speed, 4.0), motion.brake_at, motion.brake)
    placed_at = len(street.actors)
    if street.add(kind, motion) and kind == "trailer":
        size = street.actors[placed_at].size
        tractor = street.size("truck")
        ahead = np.cos(motion.direction) * (size[0] / 2 + tractor[0] / 2 + 0.9)
        front = Motion(motion.s + ahead, motion.d, motion.direction, motion.speed, motion.brake_at, motion.brake)
        street.add("truck", front, size=(min(tractor[0], 6.6), tractor[1], tractor[2]))
    elif kind == "motorcyclist" and rng.random() < 0.5:
        sign = np.cos(motion.direction)
        aside = Motion(motion.s - sign * rng.uniform(3, 6), motion.d + 0.8, motion.direction, motion.speed)
        street.add(kind, aside)


def queue(street: Street) -> None:
    """Vehicles that wait on the cross street, and on the main road's far lanes, for traffic that never ends."""
    rng, road = street.rng, street.road
    for side in (-1, 1):
        d = road.front + 1.0
        for _ in range(int(rng.integers(1, 4))):
            kind = _draw(rng, {"car": 0.6, "truck": 0.2, "bus": 0.1, "construction": 0.1})
            size = street.size(kind)
            at = road.crossing + side * road.cross_half / 2
            street.add(kind, Motion(at, side * (d + size[0] / 2), -side * np.pi / 2), size=size)
            d += size[0] + rng.uniform(1.2, 2.5)


def on_foot(street: Street, span: tuple[float, float], duration: float) -> None:
    """People along the sidewalks, standing in groups, and crossing at the zebras."""
    rng, road = street.rng, street.road
    for side in (-1, 1):
        for s in np.arange(span[0], span[1], 9.0):
            d = side * rng.uniform(road.kerb + 1.2, road.front - 0.5)
            at = s + rng.uniform(0, 8)
            kind = "child" if rng.random() < 0.12 else "pedestrian"
            if rng.random() < 0.3:
                street.add(kind, Motion(at, d, rng.uniform(0, 2 * np.pi)))
                street.add("pedestrian", Motion(at + 0.9, d + 0.3, rng.uniform(0, 2 * np.pi)))
            else:
                street.add(kind, Motion(at, d, rng.choice([0.0, np.pi]) + rng.normal(0, 0.03), rng.uniform(0.8, 1.7)))
    for zebra in (road.crossing - road.cross_half - 1.8, road.crossing + road.cross_half + 1.8, road.zebra + 1.4):
        for _ in range(6):
            speed, t, direction = rng.uniform(0.9, 1.5), rng.uniform(0, duration), rng.choice([-1, 1])
            d = rng.uniform(-road.kerb, road.kerb) - direction * speed * t
            street.add("pedestrian", Motion(zebra + rng.uniform(-1.1, 1.1), d, direction * np.pi / 2, speed))


def on_cycles(street: Street, span: tuple[float, float], ego: Motion, duration: float) -> None:
    """Cyclists in the cycle lanes, bicycles and motorcycles left on the sidewalk."""
    rng, road = street.rng, street.road
    for side in (-1, 1):
        sign = np.cos(heading(side))
        pace = rng.uniform(3.0, 5.5)
        for _ in range(round((110 + abs(pace * sign - ego.speed) * duration) / 16)):
            t = rng.uniform(0, duration)
            s = ego.s + ego.distance(t) + rng.uniform(-45, 45) - sign * pace * t
            street.add("cyclist", Motion(float(s), road.centre(side, "cycle"), heading(side), pace))
        for s in np.arange(span[0], span[1], 19.0):
            at = s + rng.uniform(0, 15)
            if abs(at - road.crossing) < road.cross_half + 5:
                continue
            kind = str(rng.choice(["bicycle", "motorcycle"], p=[0.7, 0.3]))
            facing = rng.choice([0.5, 1.57, 2.6])
            for i in range(int(rng.integers(1, 4))):
                street.add(kind, Motion(at + 1.1 * i, side * (road.kerb + 1.35), facing + rng.normal(0, 0.05)))
