"""The statistics of a quantizer, thinned out for a chart of its histogram and of its error over amax."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lean.amax import quantisation_error
from lean.density import Density
from lean.histogram import Histogram

OCTAVES = 16  # of a chart, below the largest value
BINS = 128
CANDIDATES, CANDIDATES_PER_OCTAVE = 96, 8  # of the curve of errors


def chart(histogram: Histogram, amax: float | None, num_bits: int = 8, unsigned: bool = False) -> dict[str, Any]:
    """What the report shows of one quantizer: see QUANTIZER in `lean.report.schema`.

    Within a bin of the statistics values are taken to be spread evenly.
    """
    levels, total = _levels(num_bits, unsigned), histogram.total
    data: dict[str, Any] = {"amax": amax, "levels": levels, "total": total, "zeros": histogram.zeros}
    data |= {"max": histogram.max_abs, "min": histogram.minimum, "counts": [], "below": 0.0, "errors": []}
    data |= {"clipped": None, "underflow": None, "error": None}
    if histogram.max_abs == 0:
        return data
    density = Density([histogram])
    edges = histogram.max_abs * 2.0 ** (np.arange(-BINS, 1) * (OCTAVES / BINS))
    below = values_up_to(density, edges)
    candidates = histogram.max_abs * 2.0 ** (-np.arange(CANDIDATES) / CANDIDATES_PER_OCTAVE)
    data["counts"], data["below"] = [_rounded(count) for count in np.diff(below)], _rounded(below[0])
    data["errors"] = [_rounded(error) for error in _relative(density, candidates, levels)]
    if amax is not None:
        inside, under = values_up_to(density, np.array([amax, amax / levels / 2]))
        data["clipped"] = float(density.count.sum() - inside) / total
        data["underflow"] = float(under) / total
        data["error"] = _rounded(_relative(density, np.array([amax]), levels)[0])
    return data


def charts(histograms: Mapping[str, Histogram], quantizers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The chart of each quantizer (with `amax`, `num_bits`, `unsigned`) that statistics are there for, by name."""
    found = {}
    for name, histogram in histograms.items():
        if (quantizer := quantizers.get(name)) is not None:
            amax = None if quantizer.amax is None else float(quantizer.amax)
            found[name] = chart(histogram, amax, quantizer.num_bits, quantizer.unsigned)
    return found


def values_up_to(density: Density, limits: np.ndarray) -> np.ndarray:
    """How many values, zeros left out, have |x| up to each of `limits`, of the first quantizer; float64."""
    used = density.count[0] > 0
    lower, upper = density.lower[0, used], density.upper[0, used]
    below, count = density.below[0, used], density.count[0, used]
    edges, counts = np.stack([lower, upper], 1).ravel(), np.stack([below, below + count], 1).ravel()
    return np.interp(limits, edges, counts, left=0.0)


def _relative(density: Density, amax: np.ndarray, levels: int) -> np.ndarray:
    """Squared quantisation error at each amax over the sum of squares."""
    energy = density.tails()[2][0, 0]
    return np.maximum(quantisation_error(density, np.zeros(len(amax), int), amax, levels), 0) / energy


def _levels(num_bits: int, unsigned: bool) -> int:
    return 2 ** (num_bits - 1 + int(unsigned)) - 1


def _rounded(value: float) -> float:
    """Four significant digits: a chart shows no more, and the page stays small."""
    return float(f"{value:.4g}")
