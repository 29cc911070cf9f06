"""Seeded damage to nested mappings and lists; `tests.fuzzing.damage` does it to bytes."""

import copy
import random
from typing import Any

NONSENSE = (None, True, -1, 0, 1, 2.5, -1e30, float("nan"), float("inf"), 2**70, "", "x", "../..", [], [0], {}, "${x}")


def damage_structure(value: Any, rng: random.Random) -> Any:
    """A copy of `value` with one to three of its nodes replaced, removed, repeated or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = [(holder, key) for holder in _holders(value) for key in _keys(holder)]
        if not places:
            return value
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other[at])
        elif kind == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 3 and type(holder[key]) in (int, float):
            holder[key] = rng.choice([-holder[key], holder[key] + 1, holder[key] * 2, holder[key] / 2])
        else:
            holder[key] = copy.deepcopy(rng.choice(NONSENSE))
    return value


def _holders(value: Any) -> list:
    """Every mapping and list in `value`, itself included."""
    found, todo = [], [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict | list):
            found.append(one)
            todo += one.values() if isinstance(one, dict) else one
    return found


def _keys(holder: dict | list) -> list:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))
