"""Rulebooks against dense convolutions."""

import numpy as np
import pytest
import torch

from lean.errors import QuantizationError
from lean.export.scn_arithmetic import convolve
from lean.export.scn_rulebook import build_rulebook, decode, encode

GRID = (9, 7, 5)


def cloud(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Features (V, 3) of two frames and distinct coordinates, in no order."""
    generator = np.random.default_rng(1)
    places = generator.choice(2 * np.prod(GRID), count, replace=False)
    coordinates = np.stack(np.unravel_index(places, (2, *GRID)), 1)
    return generator.normal(size=(count, 3)), coordinates


def to_dense(features: np.ndarray, coordinates: np.ndarray, grid: tuple) -> torch.Tensor:
    dense = np.zeros((2, features.shape[1], *grid))
    dense[coordinates[:, 0], :, coordinates[:, 1], coordinates[:, 2], coordinates[:, 3]] = features
    return torch.from_numpy(dense)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (1, 1, 0), (1, 1, 1)),
        ((1, 1, 3), (1, 1, 2), (0, 0, 0), (1, 1, 1)),
        ((2, 3, 1), (1, 3, 2), (1, 2, 0), (2, 1, 1)),
    ],
)
def test_strided_convolutions(kernel, stride, padding, dilation):
    features, coordinates = cloud()
    weight = np.random.default_rng(2).normal(size=(4, *kernel, 3))
    expected = torch.nn.functional.conv3d(
        to_dense(features, coordinates, GRID),
        torch.from_numpy(weight).permute(0, 4, 1, 2, 3),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    after = tuple(expected.shape[2:])
    rules = build_rulebook(coordinates, GRID, after, kernel, stride, padding, dilation, subm=False)
    actual = to_dense(convolve(features, weight, rules), rules.coordinates, after)
    torch.testing.assert_close(actual, expected)
    order = np.lexsort(rules.coordinates.T[::-1])
    np.testing.assert_array_equal(order, np.arange(len(order)))


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3, 3), (1, 1, 1)), ((1, 3, 5), (1, 2, 1))])
def test_submanifold_convolutions(kernel, dilation):
    features, coordinates = cloud()
    weight = np.random.default_rng(2).normal(size=(4, *kernel, 3))
    rules = build_rulebook(coordinates, GRID, GRID, kernel, (1, 1, 1), (0, 0, 0), dilation, subm=True)
    np.testing.assert_array_equal(rules.coordinates, coordinates)
    expected = torch.nn.functional.conv3d(
        to_dense(features, coordinates, GRID),
        torch.from_numpy(weight).permute(0, 4, 1, 2, 3),
        padding=[k // 2 * d for k, d in zip(kernel, dilation, strict=True)],
        dilation=dilation,
    )
    batch, x, y, z = coordinates.T
    np.testing.assert_allclose(convolve(features, weight, rules), expected.numpy()[batch, :, x, y, z], atol=1e-12)


@pytest.mark.parametrize("subm", [True, False])
def test_no_voxels(subm):
    empty = np.zeros((0, 4), np.int64)
    rules = build_rulebook(empty, GRID, GRID, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), subm)
    assert convolve(np.zeros((0, 3)), np.ones((4, 3, 3, 3, 3)), rules).shape == (0, 4)


def test_numbers_of_voxels_order_them_and_can_be_undone():
    _, coordinates = cloud()
    keys = encode(coordinates, GRID)
    np.testing.assert_array_equal(decode(keys, GRID), coordinates)
    np.testing.assert_array_equal(np.argsort(keys), np.lexsort(coordinates.T[::-1]))


@pytest.mark.parametrize(
    ("coordinates", "words"),
    [([[0, 1, 2, 3], [0, 1, 2, 3]], "same coordinates"), ([[0, 9, 0, 0]], "outside the grid of 9 x 7 x 5")],
)
def test_voxels_that_can_not_be(coordinates, words):
    geometry = ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    with pytest.raises(QuantizationError, match=words):
        build_rulebook(np.array(coordinates), GRID, GRID, *geometry, subm=True)
