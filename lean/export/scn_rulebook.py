"""Rulebooks of sparse convolutions: which input voxel reaches which output voxel through which kernel tap.

Coordinates are (batch, x, y, z); the three axes may stand for z, y, x as well. Follows SECOND (Yan et al., 2018) and
Graham and van der Maaten, Submanifold Sparse Convolutional Networks (2017).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lean.errors import QuantizationError


@dataclass(frozen=True)
class Rulebook:
    """Pairs of rows for each tap of a kernel.

    Attributes:
        voxels: number of input voxels.
        coordinates: int64 (V', 4) of the output voxels.
        pairs: for each tap, kernel axes in C order, the input rows and the output rows; no row twice in either.
    """

    voxels: int
    coordinates: np.ndarray
    pairs: list[tuple[np.ndarray, np.ndarray]]


def build_rulebook(
    coordinates: np.ndarray,
    before: Sequence[int],
    after: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    subm: bool,
) -> Rulebook:
    """Find the output voxels and pairs of a convolution.

    A submanifold convolution has the voxels of its input, in their order, and a centred kernel. Any other has each
    voxel that a tap reaches, in lexicographic order: output = (input + padding - tap * dilation) / stride.

    Args:
        coordinates: int64 (V, 4), distinct.
        before, after: cells of the grid before and after.

    Raises:
        QuantizationError: two voxels have the same coordinates, or one lies outside the grid.
    """
    inputs = encode(coordinates, before)
    order = np.argsort(inputs)
    if (np.diff(inputs[order]) == 0).any():
        raise QuantizationError("two voxels have the same coordinates")
    taps = np.stack(np.meshgrid(*map(np.arange, kernel), indexing="ij"), -1).reshape(-1, 3)
    if subm:
        shifts = (taps - np.asarray(kernel) // 2) * dilation
        pairs = [_neighbours(coordinates, shift, inputs, order, before) for shift in shifts]
        return Rulebook(len(coordinates), coordinates, pairs)
    reached = [_reached(coordinates, np.asarray(padding) - tap * dilation, stride, after) for tap in taps]
    outputs = np.unique(np.concatenate([keys for _, keys in reached]))
    pairs = [(rows, np.searchsorted(outputs, keys)) for rows, keys in reached]
    return Rulebook(len(coordinates), decode(outputs, after), pairs)


def encode(coordinates: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Number of each voxel, int64 (V,): lexicographic, so that sorting by it sorts the coordinates."""
    positions = coordinates[:, 1:]
    if ((positions < 0) | (positions >= np.asarray(grid))).any():
        raise QuantizationError(f"a voxel lies outside the grid of {' x '.join(map(str, grid))} cells")
    return ((coordinates[:, 0] * grid[0] + positions[:, 0]) * grid[1] + positions[:, 1]) * grid[2] + positions[:, 2]


def decode(keys: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Undo `encode`: int64 (V, 4)."""
    rest, z = np.divmod(keys, grid[2])
    rest, y = np.divmod(rest, grid[1])
    batch, x = np.divmod(rest, grid[0])
    return np.stack([batch, x, y, z], 1)


def _neighbours(
    coordinates: np.ndarray, shift: np.ndarray, inputs: np.ndarray, order: np.ndarray, grid: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the voxels at `coordinates + shift` that exist, and the rows that they are neighbours of."""
    wanted = coordinates[:, 1:] + shift
    rows = np.flatnonzero(((wanted >= 0) & (wanted < np.asarray(grid))).all(1))
    keys = encode(np.concatenate([coordinates[rows, :1], wanted[rows]], 1), grid)
    places = order[np.minimum(np.searchsorted(inputs, keys, sorter=order), len(inputs) - 1)]
    found = inputs[places] == keys
    return places[found], rows[found]


def _reached(
    coordinates: np.ndarray, shift: np.ndarray, stride: Sequence[int], grid: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Input rows that reach a voxel of the output grid through one tap, and that voxel's number."""
    shifted = coordinates[:, 1:] + shift
    positions, remainder = np.divmod(shifted, stride)
    inside = (positions >= 0) & (positions < np.asarray(grid)) & (remainder == 0)
    rows = np.flatnonzero(inside.all(1))
    return rows, encode(np.concatenate([coordinates[rows, :1], positions[rows]], 1), grid)
