"""Choosing amax from statistics: pure functions in float64, for all quantizers of a model at once.

Within a bin the values are taken to be spread evenly, and the highest bin in use ends at the exact maximum. Zeros are
left out of the searches, since every scale represents them exactly; only `percentile_amax` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lean.density import Density
from lean.errors import QuantizationError
from lean.histogram import ZERO, Histogram

METHODS = ("mse", "entropy", "percentile", "max")
STEPS_PER_OCTAVE = 64  # MSE candidates are maximum * 2^(-i / 64): neighbours differ by 1.1 %
OCTAVES = 16
ENTROPY_BINS = 2048  # entropy candidates are maximum * i / 2048, as in pytorch-quantization
_COARSE = 32  # every 32nd candidate is tried first, to rule out most of the others
_TINY = 1e-300
_PAIRS = 256  # (quantizer, candidate) pairs evaluated at a time: keeps the work arrays in the cache


def quantisation_error(density: Density, row: np.ndarray, amax: np.ndarray, levels: int) -> np.ndarray:
    """Sum of (x - Q(x))^2 over the values of quantizer row[i] for amax[i], float64 (pairs,).

    With step s = a / levels and Q(x) = s * min(round(x / s), levels), summation by parts gives
    sum (x - a)^2 - 2 s * (G(s / 2) + G(3 s / 2) + ... + G((levels - 1/2) s)),
    where G is a prefix sum over the bins: `levels` look-ups, however many bins and values there are.
    """
    slope = np.divide(density.count, density.width, out=np.zeros_like(density.width), where=density.width > 0)
    zeroth, first, second = (tail[row, 0] for tail in density.tails())
    error = second - 2 * amax * first + amax**2 * zeroth
    thresholds = (np.arange(levels) + 0.5) / levels
    for start in range(0, len(row), _PAIRS):
        pairs = slice(start, start + _PAIRS)
        t = amax[pairs, None] * thresholds
        column = density.bin_of(t)
        past = np.maximum(t - density.lower[0].take(column), 0)
        index = column + row[pairs, None] * density.count.shape[1]
        area = density.area.take(index) + past * (density.below.take(index) + past / 2 * slope.take(index))
        error[pairs] -= 2 * amax[pairs] / levels * area.sum(axis=1)
    return error


def mse_candidates(histograms: Sequence[Histogram]) -> np.ndarray:
    """The amax that `mse_amax` compares: maximum * 2^(-i / 64), i = 0 ... 1024; float64 (quantizers, 1025)."""
    steps = 2.0 ** (-np.arange(OCTAVES * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)
    return np.array([h.max_abs for h in histograms])[:, None] * steps


def mse_amax(histograms: Sequence[Histogram], num_bits: int = 8, unsigned: bool = False) -> np.ndarray:
    """The candidate with the least squared quantisation error (the largest one of equals), float64 (quantizers,).

    Candidates whose clipping alone costs more than the best of a coarse grid are left out, which changes no result.
    """
    density, amax = Density(histograms), mse_candidates(histograms)
    levels = _levels(num_bits, unsigned)
    error = np.full(amax.shape, np.inf)
    row, column = (a.ravel() for a in np.mgrid[: len(amax), 0 : amax.shape[1] : _COARSE])
    error[row, column] = quantisation_error(density, row, amax[row, column], levels)
    above = density.bin_of(amax) + 1
    zeroth, first, second = (np.take_along_axis(tail, above, axis=1) for tail in density.tails())
    clipping = second - 2 * amax * first + amax**2 * zeroth
    row, column = np.nonzero((clipping <= error.min(axis=1, keepdims=True)) & np.isinf(error))
    error[row, column] = quantisation_error(density, row, amax[row, column], levels)
    return np.take_along_axis(amax, error.argmin(axis=1)[:, None], axis=1)[:, 0]


def max_amax(histograms: Sequence[Histogram]) -> np.ndarray:
    """The largest finite |x|, exactly, float64 (quantizers,)."""
    return np.array([h.max_abs for h in histograms])


def percentile_amax(histograms: Sequence[Histogram], percentile: float = 99.99) -> np.ndarray:
    """The value that `percentile` per cent of all |x|, zeros included, don't exceed; float64 (quantizers,).

    It lies in the same bin as the exact order statistic. Raises QuantizationError for a percentile outside 0 to 100.
    """
    if not 0 <= percentile <= 100:
        raise QuantizationError(f"percentile must lie between 0 and 100, got {percentile}")
    density = Density(histograms)
    zeros = np.array([h.counts[ZERO] for h in histograms], dtype=np.float64)
    wanted = (zeros + density.count.sum(axis=1)) * percentile / 100 - zeros
    reached = density.below + density.count >= wanted[:, None]
    index = np.where(reached.any(axis=1), reached.argmax(axis=1), reached.shape[1] - 1)[:, None]
    below, count, lower, width = (
        np.take_along_axis(a, index, axis=1)[:, 0] for a in (density.below, density.count, density.lower, density.width)
    )
    share = np.divide(wanted - below, count, out=np.ones_like(count), where=count > 0)
    return np.where(wanted <= 0, 0.0, np.minimum(lower + share * width, density.maximum))


def linear_histogram(density: Density, row: int, bins: int = ENTROPY_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts in `bins` equal bins from 0 to the maximum, and the share of each that lies in a used bin.

    Returns two float64 (bins,).
    """
    used = density.count[row] > 0
    lower, width, below = (a[row, used] for a in (density.lower, density.width, density.below))
    edges = np.stack([lower, lower + width], 1).ravel()
    counts = np.stack([below, below + density.count[row, used]], 1).ravel()
    support = np.stack([np.cumsum(width) - width, np.cumsum(width)], 1).ravel()
    grid = density.maximum[row] * np.arange(bins + 1) / bins
    grid[-1] = edges[-1]
    counts, support = np.interp(grid, edges, counts), np.interp(grid, edges, support)
    counts[-1] = below[-1] + density.count[row, used][-1]
    return np.diff(counts), np.diff(support) * (bins / density.maximum[row])


def level_edges(kept: np.ndarray, levels: int) -> np.ndarray:
    """First bin of each of `levels` levels when the first `kept` bins are merged into them, and at the end `kept`.

    kept: int (candidates,). Returns int (candidates, levels + 1).
    """
    return -(-kept[:, None] * np.arange(levels + 1) // levels)


def divergence(counts: np.ndarray, occupied: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of clipping a histogram after its first bins and merging those into levels.

    As in TensorRT's and pytorch-quantization's entropy calibration, P is the kept part of the histogram with all
    clipped values added to its last bin, and Q spreads what each level keeps evenly over what is occupied of the
    level: sum p log p - sum p log q, all from prefix sums.

    counts, occupied: float64 (bins,), occupied 0 where a bin is empty, and 1 where it is full; edges: int
    (candidates, levels + 1), see `level_edges`. Returns float64 (candidates,); infinite where values are clipped into
    an empty bin, or more than half of them are clipped (with a single bin left P would equal Q).
    """
    kept = edges[:, -1]
    filled = np.where(occupied > 0, occupied, 1)
    height = np.where(counts > 0, counts, 1) / filled
    entropy = np.append(0, np.cumsum(counts * np.log(height)))
    mass, area = np.append(0, np.cumsum(counts)), np.append(0, np.cumsum(occupied))
    level_mass, level_area = np.diff(mass[edges], axis=1), np.diff(area[edges], axis=1)
    log_q = np.log(np.where(level_mass > 0, level_mass / np.maximum(level_area, _TINY), 1))
    clipped = mass[-1] - mass[kept]
    last = counts[kept - 1] + clipped
    p_log_p = entropy[kept - 1] + last * np.log(np.maximum(last, _TINY) / filled[kept - 1])
    p_log_q = (level_mass * log_q).sum(axis=1) + clipped * log_q[:, -1]
    result = (p_log_p - p_log_q) / mass[-1] + np.log(np.maximum(mass[kept], _TINY) / mass[-1])
    unusable = (counts[kept - 1] == 0) | (clipped > mass[-1] / 2)
    return np.where((clipped > 0) & unusable, np.inf, result)


def entropy_amax(histograms: Sequence[Histogram], num_bits: int = 8, unsigned: bool = False) -> np.ndarray:
    """The candidate maximum * i / 2048 with the least `divergence`, the largest of equals; float64 (quantizers,)."""
    density, levels = Density(histograms), _levels(num_bits, unsigned) + 1
    kept = np.arange(ENTROPY_BINS, levels - 1, -1)
    edges = level_edges(kept, levels)
    best = np.zeros(len(histograms))
    for row in np.flatnonzero(density.maximum):
        counts, occupied = linear_histogram(density, row)
        # As in the library: what rounds to zero says nothing about the range.
        counts[0], occupied[0] = counts[1], occupied[1]
        best[row] = density.maximum[row] * kept[divergence(counts, occupied, edges).argmin()] / ENTROPY_BINS
    return best


def choose_amax(
    statistics: Mapping[str, Histogram],
    method: str = "mse",
    *,
    num_bits: int = 8,
    unsigned: bool = False,
    percentile: float = 99.99,
) -> dict[str, float]:
    """amax of each quantizer by `mse`, `entropy`, `percentile` or `max`, as a float32 value; 0 if only zeros were seen.

    percentile: for that method, the per cent of the values that must not be clipped.
    Raises QuantizationError for an unknown method, and naming the quantizers that saw no value, NaN or infinity, or, if
    unsigned, values below zero.
    """
    methods = {
        "mse": lambda h: mse_amax(h, num_bits, unsigned),
        "entropy": lambda h: entropy_amax(h, num_bits, unsigned),
        "percentile": lambda h: percentile_amax(h, percentile),
        "max": max_amax,
    }
    if method not in methods:
        raise QuantizationError(f"unknown calibration method {method!r}: choose one of {', '.join(methods)}")
    refuse_unusable(statistics, unsigned)
    if not statistics:
        return {}
    chosen = methods[method](list(statistics.values())).astype(np.float32)
    return dict(zip(statistics, chosen.tolist(), strict=True))


def refuse_unusable(statistics: Mapping[str, Histogram], unsigned: bool = False) -> None:
    """Raise QuantizationError naming the quantizers whose statistics no amax can be chosen from."""
    problems = {
        "saw no value: run them in calibration, or disable them": lambda h: h.total == 0,
        "saw NaN or infinity: look for the layer that overflows": lambda h: any(h.nonfinite.values()),
        "are unsigned and saw values below zero: make them signed": lambda h: unsigned and h.has_negative,
    }
    for problem, applies in problems.items():
        names = [name for name, histogram in statistics.items() if applies(histogram)]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise QuantizationError(f"quantizers {', '.join(names[:5])}{more} {problem}")


def _levels(num_bits: int, unsigned: bool) -> int:
    return 2 ** (num_bits - 1 + int(unsigned)) - 1
