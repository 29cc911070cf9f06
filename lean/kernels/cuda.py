"""Observing and fake-quantising on CUDA: Triton kernels that neither synchronise with the host nor allocate by value.

Counting needs increments in shared memory: activations crowd into a few octaves, and global atomics on a few hundred
addresses would queue up. Triton has no such operation (`tl.histogram` builds on warp votes, whose cost grows with the
number of bins, before Triton 3.7), so three lines of PTX declare the table, add to it and read it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean import histogram as layout

_COARSE_SHIFT = tl.constexpr(layout.COARSE_SHIFT)
_FINE_SHIFT = tl.constexpr(layout.FINE_SHIFT)
_FINE_LOW = tl.constexpr(layout.FINE_LOW)
_FINE_HIGH = tl.constexpr(layout.FINE_HIGH)
_INF_BITS = tl.constexpr(layout.INF_BITS)
_MAGNITUDE = tl.constexpr(layout.MAGNITUDE)
_ZERO = tl.constexpr(layout.ZERO)
_NAN = tl.constexpr(layout.NAN)
_POS_INF = tl.constexpr(layout.POS_INF)
_NEG_INF = tl.constexpr(layout.NEG_INF)
_PADDING = tl.constexpr(layout.PADDING)
_SLOTS = tl.constexpr(layout.SLOTS)

# The address of slot $1 in the program's table; the braces keep the register names apart where the code is repeated.
_ADDRESS = ".reg .u32 a; mov.u32 a, observed; mad.lo.u32 a, $1, 4, a;"
_DECLARE = tl.constexpr(f".shared .align 16 .b32 observed[{layout.SLOTS}]; mov.u32 $0, $1;")
_CLEAR = tl.constexpr(f"{{ {_ADDRESS} st.shared.u32 [a], 0; mov.u32 $0, 0; }}")
_ADD = tl.constexpr(f"{{ {_ADDRESS} red.shared.add.u32 [a], 1; mov.u32 $0, 0; }}")
_READ = tl.constexpr(f"{{ {_ADDRESS} ld.shared.u32 $0, [a]; }}")

_CHUNK = 1 << 30  # values a launch takes, so that offsets fit 32 bits
_TILE = 4096
_WARPS = 8
_BLOCKS_PER_MULTIPROCESSOR = 4  # what 228 KB of shared memory hold
_QUANTIZE_TILE = 4096

_EPSILON = tl.constexpr(2.0**-24)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds |y| < 2^22 to integers, ties to even


@triton.jit
def _shared(code: tl.constexpr, operand):
    return tl.inline_asm_elementwise(code, "=r,r", [operand], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _slot(signed):
    """Slot of float32 bit patterns, as `lean.histogram.Histogram.from_values` assigns them."""
    bits = signed & _MAGNITUDE
    low = tl.minimum(bits, _FINE_LOW)
    high = tl.maximum(bits, _FINE_HIGH) - _FINE_HIGH
    slot = (low >> _COARSE_SHIFT) + ((bits - low - high) >> _FINE_SHIFT) + (high >> _COARSE_SHIFT)
    slot = tl.where(bits == 0, _ZERO, slot)
    special = tl.where(bits > _INF_BITS, _NAN, tl.where(signed < 0, _NEG_INF, _POS_INF))
    return tl.where(bits < _INF_BITS, slot, special)


@triton.jit
def _observe(x, counts, extremes, size, SHARED: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr):
    """Each program counts every num_programs-th tile in shared memory, then adds its table to the state."""
    lane = tl.arange(0, THREADS)
    if SHARED:
        _shared(_DECLARE, lane)
        for first in range(0, _SLOTS, THREADS):
            _shared(_CLEAR, first + lane)
        tl.debug_barrier()
    positive = tl.zeros((TILE,), tl.int32)
    negative = tl.zeros((TILE,), tl.int32)
    for start in range(tl.program_id(0) * TILE, size, tl.num_programs(0) * TILE):
        offset = start + tl.arange(0, TILE)
        inside = offset < size
        signed = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
        slot = tl.where(inside, _slot(signed), _PADDING)
        if SHARED:
            _shared(_ADD, slot)
        else:
            tl.atomic_add(counts + slot, tl.full((TILE,), 1, tl.int64), mask=inside, sem="relaxed")
        bits = signed & _MAGNITUDE
        bits = tl.where(bits < _INF_BITS, bits, 0)
        positive = tl.maximum(positive, tl.where(signed >= 0, bits, 0))
        negative = tl.maximum(negative, tl.where(signed < 0, bits, 0))
    if SHARED:
        tl.debug_barrier()
        for first in range(0, _SLOTS, THREADS):
            slot = first + lane
            seen = _shared(_READ, slot)
            tl.atomic_add(counts + slot, seen.to(tl.int64), mask=(seen > 0) & (slot < _PADDING), sem="relaxed")
    tl.atomic_max(extremes, tl.max(positive, axis=0), sem="relaxed")
    tl.atomic_max(extremes + 1, tl.max(negative, axis=0), sem="relaxed")


@triton.jit
def _fake_quantize(
    x,
    amax,
    out,
    size,
    channels,
    inner,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ONE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One read and one write; ONE: a single amax, else element i takes amax[i // inner % channels]."""
    offset = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * TILE + tl.arange(0, TILE)
    inside = offset < size
    values = tl.load(x + offset, mask=inside, other=0.0)
    bound = tl.load(amax) if ONE else tl.load(amax + offset // inner % channels, mask=inside, other=1.0)
    zero = bound <= _EPSILON
    scale = tl.div_rn(HIGH * 1.0, bound)
    y = values.to(tl.float32) * tl.where(zero, 0.0, scale)
    # Clamping before rounding is the same for integer bounds; comparisons let NaN through, as torch.clamp does.
    y = tl.where(y > HIGH, HIGH * 1.0, y)
    y = tl.where(y < LOW, LOW * 1.0, y)
    q = (y + _ROUNDER) - _ROUNDER
    divisor = scale.to(values.dtype).to(tl.float32)
    tl.store(out + offset, tl.div_rn(q, tl.where(zero, 1.0, divisor)).to(values.dtype), mask=inside)


class _Launcher:
    """Launches a kernel by the binary that was compiled for arguments of the same kind.

    Triton's own dispatch works the kind out of every argument in each launch and costs more host time (60 us) than
    most layers of a network compute.

    Args:
        kernel: what `triton.jit` gives.
        options: `num_warps` and the like.
    """

    def __init__(self, kernel: Any, **options: Any):
        self._kernel, self._options = kernel, options
        self._binaries: dict[tuple, Any] = {}

    def __call__(
        self, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...], constants: tuple[int, ...]
    ) -> None:
        """Run `programs` programs on the tensors' device; the dtypes of the first tensor tell those of the others."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        device = tensors[0].get_device()
        # All that Triton specialises on: alignment to 16, the number 1, multiples of 16, more than 32 bits.
        kind = (
            *(device, tensors[0].dtype, constants),
            *[address & 15 for address in addresses],
            *[-1 if number == 1 else (number & 15, number >> 31) for number in numbers],
        )
        binary = self._binaries.get(kind)
        if binary is None:
            with torch.cuda.device_of(tensors[0]):
                launched = self._kernel[(programs,)](*tensors, *numbers, *constants, **self._options)
            self._binaries[kind] = launched  # None in Triton's interpreter, which compiles nothing
        elif device == torch.cuda.current_device():
            binary[(programs, 1, 1)](*addresses, *numbers, *constants)
        else:
            with torch.cuda.device(device):
                binary[(programs, 1, 1)](*addresses, *numbers, *constants)


_OBSERVE = _Launcher(_observe, num_warps=_WARPS)
# Without fusion y + _ROUNDER would still be exact, but x * scale must be rounded before it.
_FAKE_QUANTIZE = _Launcher(_fake_quantize, num_warps=4, enable_fp_fusion=False)


@cache
def _programs(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count * _BLOCKS_PER_MULTIPROCESSOR


def observe(x: Tensor, counts: Tensor, extremes: Tensor) -> None:
    """Add a dense tensor's values to the state (see `lean.kernels.observe`)."""
    size = x.numel()
    if size > _CHUNK:
        for chunk in x.detach().as_strided((size,), (1,)).split(_CHUNK):
            observe(chunk, counts, extremes)
        return
    programs = min(-(-size // _TILE), _programs(x.get_device()))
    _OBSERVE(programs, (x, counts, extremes), (size,), (True, _TILE, 32 * _WARPS))


def fake_quantize(x: Tensor, amax: Tensor, out: Tensor, inner: int, low: int, high: int) -> None:
    """Fill `out` with the fake-quantised `x`; both dense, in one layout (see `lean.kernels.fake_quantize`)."""
    size, channels = x.numel(), amax.numel()
    constants = (low, high, channels == 1, size > _CHUNK, _QUANTIZE_TILE)
    _FAKE_QUANTIZE(-(-size // _QUANTIZE_TILE), (x, amax, out), (size, channels, inner), constants)
