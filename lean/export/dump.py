"""Folders of `.tensor` files: the tensors of one frame, and how two such folders differ.

`python -m lean.export.dump A B` prints the differences.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from lean.errors import QuantizationError
from lean.export.folder import all_or_none
from lean.export.tensor_file import read_tensor, write_tensor

ENDING = ".tensor"
# Tensors whose rows belong together, in an order of no account; the first two tell the rows apart.
VOXELS = ("lidar.backbone.coordinates", "lidar.backbone.features")
PROPOSALS = tuple(f"head.bbox.{name}" for name in ("reg", "score", "rot", "dim", "height", "vel"))
BOXES = ("boxes", "labels", "scores")
FAR = 1e6


def write_dump(folder: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `NAME.tensor` for every tensor, all of them or none; other files in `folder` stay.

    Raises:
        QuantizationError: the folder can't be written.
    """
    with all_or_none(Path(folder)) as staging:
        for name, value in tensors.items():
            write_tensor(staging / f"{name}{ENDING}", value)


def read_dump(folder: str | Path) -> dict[str, np.ndarray]:
    """Read all `.tensor` files of a folder, by name, sorted.

    Raises:
        QuantizationError: it is no folder, holds no such file, or a damaged one.
    """
    files = sorted(Path(folder).glob(f"*{ENDING}"))
    if not files:
        raise QuantizationError(f"{folder}: no {ENDING} files there; write them with qat/eval.py --dump")
    return {file.name.removesuffix(ENDING): read_tensor(file) for file in files}


@dataclass(frozen=True)
class Difference:
    """How a tensor of two dumps differs.

    Attributes:
        shapes: in the first and the second dump, None where it lacks.
        relative: L2 norm of the difference by that of the first tensor; None where the shapes differ.
        largest: absolute difference.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    relative: float | None = None
    largest: float | None = None

    def __str__(self) -> str:
        first, second = ("absent" if shape is None else "x".join(map(str, shape)) or "1" for shape in self.shapes)
        shape = first if first == second else f"{first} | {second}"
        numbers = ["-" if x is None else f"{x:.3g}" for x in (self.relative, self.largest)]
        return f"{self.name:<40} {shape:<24} {numbers[0]:>10} {numbers[1]:>10}"


def compare(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Iterator[Difference]:
    """Compare tensors by name, those of the first dump first.

    Voxels are paired by their coordinates, proposals and boxes by class and centre: their order is of no account.
    """
    second = {**second, **_ordered_like(first, second)}
    for name in {**first, **second}:
        a, b = first.get(name), second.get(name)
        shapes = tuple(None if x is None else x.shape for x in (a, b))
        if a is None or b is None or a.shape != b.shape:
            yield Difference(name, shapes)
            continue
        a, difference = a.astype(np.float64), b.astype(np.float64) - a
        norms = np.linalg.norm(difference), np.linalg.norm(a)
        relative = norms[0] / norms[1] if norms[1] else (np.inf if norms[0] else 0.0)
        yield Difference(name, shapes, float(relative), float(np.abs(difference).max(initial=0)))


def _ordered_like(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of the second dump whose rows have an order of their own, in the order of the first."""
    found = {}

    def pair(names: tuple[str, ...], axis: int, keys: Callable[[Mapping], np.ndarray]) -> None:
        present = [name for name in names if name in first and name in second]
        if names[0] not in present or names[1] not in present or first[names[0]].shape != second[names[0]].shape:
            return
        order = _assignment(keys(first), keys(second))
        found.update({name: second[name].take(order, axis) for name in present})

    pair(VOXELS, 0, lambda dump: dump[VOXELS[0]])
    pair(PROPOSALS, 2, lambda dump: _keys(dump[PROPOSALS[0]][0].T, dump[PROPOSALS[1]][0].argmax(0)))
    pair(BOXES, 0, lambda dump: _keys(dump[BOXES[0]][:, :2], dump[BOXES[1]]))
    return found


def _keys(centres: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Points (P, 3) of which those of other classes lie far apart."""
    return np.column_stack([centres.astype(np.float64), FAR * classes])


def _assignment(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For each row of `first` a row of `second`, none twice, so that all together lie close."""
    if first.dtype.kind in "iu":  # equal rows, in any order
        places, order = np.lexsort(first.T[::-1]), np.lexsort(second.T[::-1])
        paired = np.empty_like(order)
        paired[places] = order
        return paired
    return linear_sum_assignment(np.linalg.norm(first[:, None] - second, axis=2))[1]


def main() -> int:
    """Print how the tensors of two folders differ."""
    parser = argparse.ArgumentParser(prog="python -m lean.export.dump", description=main.__doc__)
    parser.add_argument("first", metavar="A", help="folder of .tensor files")
    parser.add_argument("second", metavar="B", help="another one")
    args = parser.parse_args()
    try:
        first, second = read_dump(args.first), read_dump(args.second)
    except QuantizationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'tensor':<40} {'shape':<24} {'relative':>10} {'largest':>10}")
    print(*compare(first, second), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
