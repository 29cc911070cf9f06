"""Observing and fake-quantising on the CPU: Numba loops that LLVM turns into SIMD code, over torch's number of threads.

Numba widens the result of every int32 operation to int64, which would halve the SIMD width and rule out the 32-bit
minimum and maximum instructions: hence the `_i32(...)` around each operation.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from lean.errors import QuantizationError
from lean.histogram import (
    COARSE_SHIFT,
    FINE_HIGH,
    FINE_LOW,
    FINE_SHIFT,
    INF_BITS,
    MAGNITUDE,
    NAN,
    NEG_INF,
    PADDING,
    POS_INF,
    SLOTS,
    ZERO,
)

_BLOCK = 4096  # values whose slots are computed at a time; they stay in the L1 cache
_CHUNK = 1 << 24  # values converted to float32 at a time
_SHARE = 1 << 18  # values that are worth a thread
_EPSILON = np.float32(2.0**-24)

_i32 = np.int32
_u32 = np.uint32


@numba.njit(nogil=True, cache=True)
def _slots(bits, slots):
    """Slot of each float32 bit pattern, and the two extremes; vectorised."""
    positive, negative = _i32(0), _i32(0)
    for i in range(bits.size):
        signed = bits[i]
        m = _i32(signed & _i32(MAGNITUDE))
        low = min(m, _i32(FINE_LOW))
        high = _i32(max(m, _i32(FINE_HIGH)) - _i32(FINE_HIGH))
        fine = _i32(m - low - high)
        slot = _i32(_i32(low >> _i32(COARSE_SHIFT)) + _i32(fine >> _i32(FINE_SHIFT)) + _i32(high >> _i32(COARSE_SHIFT)))
        slot = _i32(ZERO) if m == _i32(0) else slot
        special = _i32(NEG_INF) if signed < _i32(0) else _i32(POS_INF)
        special = _i32(NAN) if m > _i32(INF_BITS) else special
        finite = m < _i32(INF_BITS)
        slots[i] = np.uint16(slot if finite else special)
        value = m if finite else _i32(0)
        positive = max(positive, value if signed >= _i32(0) else _i32(0))
        negative = max(negative, value if signed < _i32(0) else _i32(0))
    return positive, negative


@numba.njit(nogil=True, cache=True)
def _count(bits, counts, extremes):
    """Add fewer than 2^32 values to a state; four tables in turn, as equal neighbours would wait for each other."""
    table0, table1 = np.zeros(SLOTS, _u32), np.zeros(SLOTS, _u32)
    table2, table3 = np.zeros(SLOTS, _u32), np.zeros(SLOTS, _u32)
    slots = np.empty(_BLOCK, np.uint16)
    for start in range(0, bits.size, _BLOCK):
        part = bits[start : start + _BLOCK]
        positive, negative = _slots(part, slots)
        extremes[0] = max(extremes[0], positive)
        extremes[1] = max(extremes[1], negative)
        slots[part.size :] = PADDING
        for i in range(0, _BLOCK, 4):
            table0[slots[i]] += _u32(1)
            table1[slots[i + 1]] += _u32(1)
            table2[slots[i + 2]] += _u32(1)
            table3[slots[i + 3]] += _u32(1)
    for slot in range(PADDING):
        counts[slot] += np.int64(table0[slot]) + table1[slot] + table2[slot] + table3[slot]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fake_quantize(x, scales, divisors, inner, first, low, high, out):
    """One read and one write; rows of `inner` values take the scales in turn. Comparisons let NaN through, as torch."""
    for row in range(x.size // inner):
        scale, divisor = scales[(first + row) % scales.size], divisors[(first + row) % scales.size]
        source, target = x[row * inner : (row + 1) * inner], out[row * inner : (row + 1) * inner]
        for i in range(inner):
            q = np.rint(np.float32(source[i] * scale))
            q = high if q > high else q
            q = low if q < low else q
            target[i] = q / divisor


def _shares(size: int, align: int = 1) -> list[slice]:
    """Slices of range(size), cut at multiples of `align`, one for each thread that is worth starting."""
    workers = min(torch.get_num_threads(), 1 + size // _SHARE)
    step = -(-size // (workers * align)) * align
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _flat(x: Tensor) -> Tensor:
    """The values of a dense tensor as a 1-D view, in memory order."""
    return x.detach().as_strided((x.numel(),), (1,))


def observe(x: Tensor, counts: Tensor, extremes: Tensor) -> None:
    """Add a dense tensor's values to the state (see `lean.kernels.observe`)."""
    state = counts.numpy(), extremes.numpy()
    for chunk in _flat(x).split(_CHUNK):
        bits = chunk.float().numpy().view(np.int32)
        shares = _shares(bits.size)
        if len(shares) == 1:
            _count(bits, *state)
            continue
        own = [(np.zeros_like(state[0]), np.zeros_like(state[1])) for _ in shares]
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(lambda share, part, bits=bits: _count(bits[share], *part), shares, own))
        for own_counts, own_extremes in own:
            np.add(state[0], own_counts, out=state[0])
            np.maximum(state[1], own_extremes, out=state[1])


def _scales(amax: np.ndarray, high: int, half: bool) -> tuple[np.ndarray, np.ndarray]:
    """What to multiply by and what to divide by, float32; an amax that float16 can't hold quantises to zero."""
    zero = amax <= _EPSILON
    scales = np.float32(high) / np.where(zero, np.float32(1), amax)
    divisors = np.where(zero, np.float32(1), scales)
    if half:
        with np.errstate(over="ignore"):
            divisors = divisors.astype(np.float16).astype(np.float32)
    return np.where(zero, np.float32(0), scales), divisors


def fake_quantize(x: Tensor, amax: Tensor, out: Tensor, inner: int, low: int, high: int) -> None:
    """Fill `out` with the fake-quantised `x`; both dense, in one layout (see `lean.kernels.fake_quantize`)."""
    if low == 0 and x.min() < 0:
        raise QuantizationError("negative values in an unsigned quantizer: make it signed in the recipe")
    x, amaxes, target = _flat(x), amax.detach().numpy().reshape(-1), _flat(out)
    if (amaxes < 0).any():
        raise QuantizationError("an amax is negative: calibrate again")
    half = out.dtype == torch.float16
    scales, divisors = _scales(amaxes, high, half)
    values, bounds = x.float().numpy(), (np.float32(low), np.float32(high))
    result = np.empty_like(values) if half else target.numpy()

    def fill(share: slice) -> None:
        rows = min(inner, share.stop - share.start), share.start // inner
        _fake_quantize(values[share], scales, divisors, *rows, *bounds, result[share])

    shares = _shares(values.size, 1 if scales.size == 1 else inner)
    if len(shares) == 1:
        fill(shares[0])
    else:
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(fill, shares))
    if half:
        target.copy_(torch.from_numpy(result))
