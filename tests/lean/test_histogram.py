"""Histograms: exact, independent of how the values come, mergeable, and saved without loss."""

import numpy as np
import pytest

from lean.errors import QuantizationError
from lean.histogram import BINS, PADDING, SLOTS, Histogram, bin_edges

EXTREME_VALUES = [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, 2.0**-48, 2.0**32, 3.4e38, -3.4e38, 1.0, -1.0, 127.99999]


def mixed_values(rng: np.random.Generator, size: int = 20_000) -> np.ndarray:
    """Values of every magnitude that float32 has, zeros and both signs among them."""
    values = rng.standard_normal(size) * 10.0 ** rng.uniform(-44, 38, size)
    values[rng.random(size) < 0.3] = 0
    return np.concatenate([np.clip(values, -3.4e38, 3.4e38), EXTREME_VALUES]).astype(np.float32)


def test_the_state_of_a_quantizer_stays_below_100_kilobytes():
    saved = Histogram.empty().to_dict()
    assert sum(array.nbytes for array in saved.values()) < 100_000


def test_every_value_is_counted_once_in_the_bin_whose_edges_enclose_it():
    values = mixed_values(np.random.default_rng(0))
    histogram = Histogram.from_values(values)
    magnitudes = np.abs(values[values != 0]).astype(np.float64)
    expected, _ = np.histogram(magnitudes, bins=bin_edges())
    assert np.array_equal(histogram.counts[:BINS], expected)
    assert histogram.zeros == (values == 0).sum()
    assert histogram.total == values.size
    assert not histogram.counts[PADDING:].any()


def test_bins_are_fine_where_activations_lie_and_cover_all_of_float32():
    edges = bin_edges()
    assert edges[0] == 0
    assert edges[-1] > np.finfo(np.float32).max
    inside = edges[(edges >= 2.0**-48) & (edges < 2.0**32)]
    assert (np.diff(inside) / inside[:-1]).max() <= 1 / 128
    normal = edges[edges >= np.finfo(np.float32).tiny]
    assert (np.diff(normal) / normal[:-1]).max() <= 1 / 8


def test_extremes_are_exact_and_keep_the_sign():
    histogram = Histogram.from_values(np.array([0.1, 3.7, -5.3, 0.0, np.inf, -np.inf, np.nan], np.float32))
    assert histogram.max_abs == np.float32(5.3)
    assert histogram.minimum == np.float32(-5.3)
    assert histogram.has_negative
    relu = Histogram.from_values(np.array([0.0, -0.0, 2.5], np.float32))
    assert not relu.has_negative
    assert (relu.minimum, relu.max_abs) == (0, 2.5)


def test_non_finite_values_are_counted_apart():
    payloads = np.array([0x7F800001, 0x7FC00000, 0xFFFFFFFF], np.uint32).view(np.float32)
    values = np.concatenate([np.array([1.0, np.inf, np.inf, -np.inf], np.float32), payloads])
    histogram = Histogram.from_values(values)
    assert histogram.nonfinite == {"NaN": 3, "+Inf": 2, "-Inf": 1}
    assert histogram.counts[:BINS].sum() == 1


@pytest.mark.parametrize("seed", range(10))
def test_the_result_depends_neither_on_splits_nor_on_order(seed):
    rng = np.random.default_rng(seed)
    values = mixed_values(rng)
    whole = Histogram.from_values(values)
    cuts = np.sort(rng.integers(0, values.size, rng.integers(1, 12)))
    parts = [Histogram.from_values(part) for part in np.split(rng.permutation(values), cuts)]
    while len(parts) > 1:  # merge two arbitrary parts at a time: any tree of workers
        first, second = (parts.pop(rng.integers(len(parts))) for _ in range(2))
        parts.append(first + second)
    assert parts[0] == whole


def test_adding_nothing_changes_nothing():
    histogram = Histogram.from_values(mixed_values(np.random.default_rng(1)))
    assert histogram + Histogram.empty() == histogram
    assert Histogram.from_values(np.zeros((0, 3), np.float32)) == Histogram.empty()
    assert histogram != Histogram.empty()


def test_counts_go_beyond_32_bits():
    histogram = Histogram.from_values(np.full(1 << 16, 0.7, np.float32))
    for _ in range(17):
        histogram = histogram + histogram
    assert histogram.total == 1 << 33


def test_a_saved_histogram_comes_back(tmp_path):
    histogram = Histogram.from_values(mixed_values(np.random.default_rng(2)))
    np.savez_compressed(tmp_path / "h.npz", **histogram.to_dict())
    with np.load(tmp_path / "h.npz") as saved:
        assert Histogram.from_dict(saved) == histogram


def test_a_file_of_another_layout_is_refused():
    saved = Histogram.empty().to_dict()
    with pytest.raises(QuantizationError, match=r"lacks \['extremes'\].*calibrate again"):
        Histogram.from_dict({k: v for k, v in saved.items() if k != "extremes"})
    with pytest.raises(QuantizationError, match="another bin layout"):
        Histogram.from_dict(saved | {"layout": saved["layout"] + 1})
    with pytest.raises(QuantizationError, match=f"int64 \\({SLOTS},\\), got int32"):
        Histogram.from_dict(saved | {"counts": saved["counts"].astype(np.int32)})
