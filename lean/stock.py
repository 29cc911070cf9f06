"""The library's histogram calibrator, with the choice of amax as pure functions that need no GPU."""

import numpy as np
import torch
from pytorch_quantization.calib import HistogramCalibrator
from torch import Tensor

from lean.amax import METHODS
from lean.errors import QuantizationError

FIRST_BIN = 128  # the library's `start_bin`: no amax below this bin is tried
EPSILON = 2.0**-24  # the library quantises everything to zero at an amax up to this


class StockHistogram(HistogramCalibrator):
    """`HistogramCalibrator` that ignores leading all-zero tensors, counts non-finite ones, and runs on the CPU.

    The library gives the histogram of an all-zero first tensor the bin width 0 and fails on the next one.

    Attributes:
        nonfinite: number of tensors that held NaN or infinity; they are left out of the histogram.
    """

    def __init__(self, num_bits: int, axis: int | None, unsigned: bool):
        super().__init__(num_bits, axis, unsigned)
        self.nonfinite = 0

    def collect(self, x: Tensor) -> None:
        """Add the absolute values of `x` to the histogram."""
        largest = x.detach().abs().max().item() if x.numel() else 0.0
        if not np.isfinite(largest):
            self.nonfinite += 1
        elif largest > 0 or self._calib_hist is not None:
            super().collect(x.detach())

    def reset(self) -> None:
        """Forget what was collected."""
        super().reset()
        self._num_bins = 2048
        self.nonfinite = 0

    def compute_amax(self, method: str, *, percentile: float = 99.99) -> Tensor | None:
        """Return amax as a float32 scalar on the CPU, or None if nothing but zeros was collected."""
        if self._calib_hist is None:
            return None
        counts, edges = self._calib_hist.cpu().numpy(), self._calib_bin_edges.cpu().numpy()
        return torch.tensor(stock_amax(counts, edges, method, self._num_bits, self._unsigned, percentile=percentile))


def stock_amax(
    counts: np.ndarray,
    edges: np.ndarray,
    method: str = "mse",
    num_bits: int = 8,
    unsigned: bool = False,
    *,
    percentile: float = 99.99,
) -> float:
    """Choose amax from a histogram of absolute values as pytorch-quantization 2.1.3 does.

    Args:
        counts: (bins,) counts.
        edges: (bins + 1,) float32 edges of equally wide bins, from 0.
        method: `mse`, `entropy`, `percentile`, or `max` (upper edge of the last bin that is not empty).
        percentile: per cent of the values that `percentile` keeps.

    Returns:
        amax, a float32 value.

    Raises:
        QuantizationError: unknown method, percentile outside 0 to 100, or lengths that don't fit.
    """
    if len(edges) != len(counts) + 1:
        raise QuantizationError(f"histogram has {len(counts)} counts and {len(edges)} edges, expected one edge more")
    if method == "mse":
        return float(_mse(counts, edges, num_bits, unsigned))
    if method == "entropy":
        return float(_entropy(counts, edges, num_bits, unsigned))
    if method == "percentile":
        return float(_percentile(counts, edges, percentile))
    if method == "max":
        filled = np.flatnonzero(counts)
        return float(edges[filled[-1] + 1]) if len(filled) else 0.0
    raise QuantizationError(f"calibration method must be one of {', '.join(METHODS)}, got {method!r}")


def _percentile(counts: np.ndarray, edges: np.ndarray, percentile: float) -> np.float32:
    if not 0 <= percentile <= 100:
        raise QuantizationError(f"percentile must lie between 0 and 100, got {percentile}")
    share = np.cumsum(counts.astype(np.float64) / counts.sum(dtype=np.float64))
    return edges[np.searchsorted(share, percentile / 100)]


def _mse(counts: np.ndarray, edges: np.ndarray, num_bits: int, unsigned: bool) -> np.float32:
    """Candidate bin centre with the least squared error.

    The library's float32 arithmetic decides between near-equal candidates, so a float64 estimate from prefix sums
    only narrows them down, and the few that remain are evaluated as the library does.
    """
    centers = (edges[1:] + edges[:-1]) / 2
    bound = 2 ** (num_bits - 1 + int(unsigned)) - 1
    candidates = np.arange(min(FIRST_BIN, len(centers) - 1), len(centers))
    estimate = _mse_estimate(counts, centers, centers[candidates], bound)
    close = candidates[estimate <= estimate.min() * (1 + 1e-3)]
    best, best_mse = close[0], np.inf
    values, weights = torch.from_numpy(centers), torch.from_numpy(counts).float()
    for candidate in close:
        # Negative values don't occur, so the lower end of the range is of no account.
        scale = bound / values[candidate] if values[candidate] > EPSILON else torch.tensor(0.0)
        quantised = torch.clamp((values * scale).round_(), 0, bound)
        restored = quantised / scale if scale > 0 else quantised
        mse = ((restored - values) ** 2 * weights).mean().item()
        if mse < best_mse:
            best, best_mse = candidate, mse
    return centers[best]


def _mse_estimate(counts: np.ndarray, centers: np.ndarray, amax: np.ndarray, bound: int) -> np.ndarray:
    """Sum over the bins of count times squared error, for every amax (K,), in float64.

    Between two rounding thresholds all centres get one value v, and sum n (c - v)^2 = S2 - 2 v S1 + v^2 S0 with
    prefix sums S0, S1, S2 of n, n c and n c^2.
    """
    n, c = counts.astype(np.float64), centers.astype(np.float64)
    s0, s1, s2 = (np.concatenate([[0.0], np.cumsum(n * c**power)]) for power in range(3))
    step = amax.astype(np.float64) / bound
    error = np.zeros(len(amax))
    begin = np.zeros(len(amax), dtype=np.int64)
    for level in range(bound + 1):
        end = np.searchsorted(c, (level + 0.5) * step) if level < bound else np.full(len(amax), len(c))
        value = level * step
        error += s2[end] - s2[begin] - 2 * value * (s1[end] - s1[begin]) + value**2 * (s0[end] - s0[begin])
        begin = end
    return error


def _entropy(counts: np.ndarray, edges: np.ndarray, num_bits: int, unsigned: bool) -> np.float32:
    """Edge with the least Kullback-Leibler divergence between the clipped and the quantised distribution.

    The library's definition, for all candidates i (the first i bins are kept): the reference is the kept counts with
    the clipped ones added to the last; the quantised one spreads each level's count evenly over its non-empty bins.
    """
    levels = 2 ** (num_bits - 1 + int(unsigned))
    n = counts.astype(np.float64)
    n[0] = n[1]
    total = n.sum()
    kept = np.arange(min(FIRST_BIN, len(n)), len(n) + 1)
    s0 = np.concatenate([[0.0], np.cumsum(n)])
    filled = np.concatenate([[0], np.cumsum(n > 0)])
    own = np.concatenate([[0.0], np.cumsum(_xlogx(n))])

    begin = np.zeros(len(kept), dtype=np.int64)
    cross = np.zeros(len(kept))
    density = np.zeros(len(kept))
    for level in range(1, levels + 1):
        end = -(-kept * level // levels)
        mass, bins = s0[end] - s0[begin], filled[end] - filled[begin]
        density = np.divide(mass, bins, out=np.zeros(len(kept)), where=bins > 0)
        cross += mass * np.log(density, out=np.zeros(len(kept)), where=density > 0)
        begin = end

    last, clipped = n[kept - 1], total - s0[kept]
    reference_log = own[kept] - _xlogx(last) + _xlogx(last + clipped)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_last = np.where(last > 0, np.log(density), -np.inf)  # an empty last bin stays empty when quantised
        cross += np.where(clipped > 0, clipped * log_last, 0.0)
        divergence = (reference_log - cross) / total + np.log(s0[kept] / total)
    nothing_kept = s0[kept] == 0
    divergence[nothing_kept] = np.nan  # the library divides 0 by 0 there, and argmin then takes the last NaN
    return edges[kept[len(kept) - 1 - np.argmin(divergence[::-1])]]


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(x, out=np.zeros_like(x), where=x > 0)
