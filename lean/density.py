"""The density that a search for amax reads out of histograms: piecewise uniform over their bins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lean.histogram import BINS, Histogram, bin_edges, bin_index


class Density:
    """Piecewise uniform density of |x| of several quantizers, zeros left out.

    Float64 arrays (quantizers, bins), over the bins that any of them uses. count: values in each bin; lower, upper,
    width: the bins' edges and width; below: values below the bin; area: the integral of the cumulative count,
    G(t) = integral over u from 0 to t of #(|x| <= u), at the lower edge.
    """

    def __init__(self, histograms: Sequence[Histogram]):
        counts = np.stack([h.counts[:BINS] for h in histograms])
        used = np.append(np.flatnonzero(counts.any(axis=0)), 0)
        self._bins = slice(used[0], used.max() + 1)
        edges = bin_edges()[used[0] : used.max() + 2]
        full = np.diff(edges)
        self.count = counts[:, self._bins].astype(np.float64)
        self.maximum = np.array([h.max_abs for h in histograms])
        self.lower = np.broadcast_to(edges[:-1], self.count.shape)
        self.upper = np.minimum(edges[1:], np.maximum(self.maximum[:, None], self.lower))
        self.width = self.upper - self.lower
        self.below = np.cumsum(self.count, axis=1) - self.count
        area = self.below * full + self.count * (full - self.width / 2)
        self.area = np.cumsum(area, axis=1) - area

    def bin_of(self, values: np.ndarray) -> np.ndarray:
        """Index along the second axis of the bins that hold `values` >= 0, the first or last one if none does."""
        index = bin_index(values.astype(np.float32).view(np.int32)) - self._bins.start
        return np.clip(index, 0, self.count.shape[1] - 1, out=index)

    def tails(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums of x^0, x^1 and x^2 over each bin and all higher ones, float64 (quantizers, bins + 1)."""
        middle = (self.lower + self.upper) / 2
        moments = (1.0, middle, middle**2 + self.width**2 / 12)
        sums = (np.cumsum((self.count * m)[:, ::-1], axis=1)[:, ::-1] for m in moments)
        return tuple(np.pad(s, ((0, 0), (0, 1))) for s in sums)
