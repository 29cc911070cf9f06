"""Exact statistics of one quantizer's input: 64-bit counts of |x| in fixed logarithmic bins.

The bins are taken from the exponent and the leading mantissa bits of the float32 value, so there is no range to manage:
what is counted depends on the multiset of values alone, and merging two histograms is adding them.

An octave in [2^-48, 2^32) has 128 bins (a bin is at most 0.8 % wide, less than the step of an 8-bit quantiser at the
top of its range); the octaves outside, where no int8 scale is sensible, have 8. Zeros, NaN and the two infinities have
slots of their own after the bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lean.errors import QuantizationError

COARSE_SHIFT = 20  # leaves 3 mantissa bits
FINE_SHIFT = 16  # leaves 7 mantissa bits
FINE_LOW = (127 - 48) << 23  # bit pattern of 2^-48
FINE_HIGH = (127 + 32) << 23  # bit pattern of 2^32
INF_BITS = 0x7F800000
MAGNITUDE = 0x7FFFFFFF

BINS = (FINE_LOW >> COARSE_SHIFT) + ((FINE_HIGH - FINE_LOW) >> FINE_SHIFT) + ((INF_BITS - FINE_HIGH) >> COARSE_SHIFT)
POS_INF, NEG_INF, NAN, ZERO = range(BINS, BINS + 4)
PADDING = BINS + 4  # where kernels send lanes that hold no value; always zero in a state
SLOTS = -(-(BINS + 5) // 512) * 512  # whole blocks for the GPU; 92 KiB of int64

_LAYOUT = np.array([FINE_LOW, FINE_HIGH, FINE_SHIFT, COARSE_SHIFT], dtype=np.int64)


def bin_index(bits: np.ndarray) -> np.ndarray:
    """Bin of a non-negative float32 bit pattern (integer array of any shape); non-decreasing, `BINS` for infinity."""
    low, high = np.minimum(bits, FINE_LOW), np.maximum(bits, FINE_HIGH) - FINE_HIGH
    fine = bits - low - high
    return (low >> COARSE_SHIFT) + (fine >> FINE_SHIFT) + (high >> COARSE_SHIFT)


def bin_edges() -> np.ndarray:
    """The BINS + 1 edges, ascending float64, from 0 to 2^128; bin i holds edges[i] <= |x| < edges[i + 1], x not 0."""
    patterns = np.concatenate(
        [
            np.arange(0, FINE_LOW, 1 << COARSE_SHIFT),
            np.arange(FINE_LOW, FINE_HIGH, 1 << FINE_SHIFT),
            np.arange(FINE_HIGH, INF_BITS, 1 << COARSE_SHIFT),
        ]
    )
    return np.append(patterns.astype(np.int32).view(np.float32).astype(np.float64), 2.0**128)


@dataclass(frozen=True, eq=False)
class Histogram:
    """What a quantizer has seen.

    counts: int64 (SLOTS,), see the module's text; extremes: int32 (2,), the float32 bit patterns of the largest finite
    x > 0 and of the largest -x for finite x < 0, zero where there is none (as integers they order like the values).
    """

    counts: np.ndarray
    extremes: np.ndarray

    def __post_init__(self):
        for array, shape, dtype in ((self.counts, (SLOTS,), np.int64), (self.extremes, (2,), np.int32)):
            if array.shape != shape or array.dtype != dtype:
                raise QuantizationError(
                    f"a histogram needs {np.dtype(dtype).name} {shape}, got {array.dtype} {array.shape}: "
                    "the file was written by another version or is damaged; calibrate again"
                )

    @classmethod
    def empty(cls) -> Histogram:
        """The histogram of no values."""
        return cls(np.zeros(SLOTS, np.int64), np.zeros(2, np.int32))

    @classmethod
    def from_values(cls, values: np.ndarray) -> Histogram:
        """Count an array of any shape (values are rounded to float32): the plain form that every kernel must equal."""
        with np.errstate(over="ignore"):
            signed = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.int32)
        bits = signed & MAGNITUDE
        slots = np.where(bits == 0, ZERO, bin_index(bits))
        slots = np.where((bits == INF_BITS) & (signed < 0), NEG_INF, slots)
        slots = np.where(bits > INF_BITS, NAN, slots)
        finite = bits < INF_BITS
        extremes = [bits[finite & (signed >= 0)].max(initial=0), bits[finite & (signed < 0)].max(initial=0)]
        return cls(np.bincount(slots, minlength=SLOTS).astype(np.int64), np.array(extremes, np.int32))

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of both multisets together."""
        return Histogram(self.counts + other.counts, np.maximum(self.extremes, other.extremes))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return np.array_equal(self.counts, other.counts) and np.array_equal(self.extremes, other.extremes)

    __hash__ = None

    @cached_property
    def total(self) -> int:
        """Number of values seen, zeros and non-finite ones included."""
        return int(self.counts.sum())

    @property
    def zeros(self) -> int:
        """Number of values that were +0 or -0."""
        return int(self.counts[ZERO])

    @property
    def nonfinite(self) -> dict[str, int]:
        """Number of values that were 'NaN', '+Inf' and '-Inf'."""
        return {"NaN": int(self.counts[NAN]), "+Inf": int(self.counts[POS_INF]), "-Inf": int(self.counts[NEG_INF])}

    @property
    def has_negative(self) -> bool:
        """Whether a finite value below zero was seen."""
        return bool(self.extremes[1] > 0)

    @property
    def minimum(self) -> float:
        """The most negative finite value seen, exactly; 0 if there was none below zero."""
        return -float(self.extremes.view(np.float32)[1])

    @property
    def max_abs(self) -> float:
        """The largest finite |x| seen, exactly; 0 if only zeros (or nothing) were seen."""
        return float(self.extremes.view(np.float32).max())

    def to_dict(self) -> dict[str, np.ndarray]:
        """Arrays to save with numpy.savez."""
        return {"counts": self.counts, "extremes": self.extremes, "layout": _LAYOUT}

    @classmethod
    def from_dict(cls, arrays: Mapping[str, np.ndarray]) -> Histogram:
        """The inverse of `to_dict`; raises QuantizationError if the arrays are missing or of another bin layout."""
        missing = {"counts", "extremes", "layout"} - set(arrays)
        if missing or not np.array_equal(arrays["layout"], _LAYOUT):
            what = f"lacks {sorted(missing)}" if missing else "has another bin layout"
            raise QuantizationError(f"a saved histogram {what}: it was written by another version; calibrate again")
        return cls(arrays["counts"], arrays["extremes"])
