"""Decode JPEG files to the pixels that Pillow's wheels before 9.0 gave, bit for bit.

Those wheels held the IJG's libjpeg 9, today's hold libjpeg-turbo. Both decode luma alike; where chroma is stored at
half the resolution (4:2:0, as in nuScenes), libjpeg-turbo interpolates it, and libjpeg 9 evaluates each 8x8 chroma
block at 16x16 points (jdmaster.c, jidctint.c of libjpeg 9). Colours differ by a few levels at edges. The original
BEVFusion ran on a Pillow of that age.

Pillow decodes the luma here; it does not hand out the chroma's coefficients, so the Huffman codes (ITU-T T.81, annex F)
are read a second time. An image takes about 1.6 times as long as with Pillow alone.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from PIL import Image

FRACTION_BITS = 13  # of the integer inverse transform
PASS1_BITS = 2
# entries of the upper half of the inverse transform which libjpeg's factorisation does not round to nearest
ROUNDED_OTHERWISE = (
    (0, 6, -1), (2, 2, 1), (2, 5, 1), (3, 7, 1), (5, 2, -1), (5, 5, -1), (6, 3, 1), (7, 6, 1),
)  # fmt: skip

_MARKER = re.compile(rb"\xff([^\x00\xff])")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_HUFFMAN_TABLES, _START_OF_SCAN, _RESTART_INTERVAL = 0xC4, 0xDA, 0xDD
_SHORT = 9  # bits of most Huffman codes; their table fits the L1 cache
_ZIGZAG = np.array(
    sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8)), dtype=np.int64
)
_i32, _i64 = np.int32, np.int64


class Scan(NamedTuple):
    """The entropy-coded part of a JPEG file."""

    stream: np.ndarray  # (N,) uint8, without markers and stuffed zeros
    starts: np.ndarray  # (S,) int64, where each restart interval begins
    interval: int  # macroblocks between restarts
    short: (
        np.ndarray
    )  # (8, 512) int16, of DC tables 0..3 and AC tables 0..3: next 9 bits -> length of code << 8 | symbol
    long: np.ndarray  # (8, 65536) int16, next 16 bits -> the same; 0 for no code
    tables: np.ndarray  # (3, 2) int64, DC and AC table of each component


def decode_libjpeg9(path: str) -> Image.Image | None:
    """RGB image of the file `path`; None if it is not a sequential 4:2:0 JPEG file in YCbCr.

    Raises:
        OSError: the file is damaged.
    """
    with Image.open(path) as image:
        if not _has_half_chroma(image):
            return None
        image.draft("L", image.size)
        image.load()
        luma = np.asarray(image)
        quanta = np.array([image.quantization[layer[3]] for layer in image.layer[1:]], dtype=np.int32)
    scan = _read_scan(Path(path).read_bytes(), math.ceil(luma.shape[0] / 16) * math.ceil(luma.shape[1] / 16))
    pixels = np.empty(luma.shape, dtype=np.int32)
    if scan is None or not _add_chroma(*scan, quanta, luma, pixels):
        return None
    return Image.frombytes("RGB", luma.shape[::-1], pixels.astype("<i4", copy=False), "raw", "RGBX")


def compile_loops() -> None:
    """Compile the loops of `decode_libjpeg9`, so that data workers forked later inherit them."""
    array = numba.types.Array
    scan = array(numba.uint8, 1, "C", readonly=True), numba.int64[::1], numba.int64
    codes = numba.int16[:, ::1], numba.int16[:, ::1], numba.int64[:, ::1]
    _add_chroma.compile(
        (*scan, *codes, numba.int32[:, ::1], array(numba.uint8, 2, "C", readonly=True), numba.int32[:, ::1])
    )


def _has_half_chroma(image: Image.Image) -> bool:
    return (
        image.format == "JPEG"
        and [tuple(layer[:3]) for layer in image.layer] == [(1, 2, 2), (2, 1, 1), (3, 1, 1)]
        and image.info.get("adobe_transform", 1) == 1
        and "progressive" not in image.info
    )


def _read_scan(data: bytes, macroblocks: int) -> Scan | None:
    """The scan of a JPEG file; None if there are several, one for each component."""
    long, interval = np.zeros((8, 1 << 16), dtype=np.int16), 0
    for code, start, end in _segments(data):
        if code == _HUFFMAN_TABLES:
            _read_huffman_tables(data[start:end], long)
        elif code == _RESTART_INTERVAL:
            interval = int.from_bytes(data[start:end], "big")
        elif code == _START_OF_SCAN:
            break
    if data[start] != 3:
        return None
    tables = np.array([[table >> 4 & 3, 4 + (table & 3)] for table in data[start + 2 : start + 7 : 2]], dtype=np.int64)
    short = long[:, :: 1 << (16 - _SHORT)].copy()
    short[short >> 8 > _SHORT] = 0
    stop = _END_OF_SCAN.search(data, end)
    parts = _RESTART.split(data[end : stop.start() if stop else len(data)])
    parts = [part.replace(b"\xff\x00", b"\xff") for part in parts]
    interval = interval or macroblocks
    if len(parts) != math.ceil(macroblocks / interval):
        return None
    stream = np.frombuffer(b"".join([*parts, bytes(8)]), dtype=np.uint8)  # the reader runs up to 8 bytes ahead
    starts = np.cumsum([0, *map(len, parts[:-1])], dtype=np.int64)
    return Scan(stream, starts, interval, short, long, tables)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, first and last + 1 byte of each segment of a JPEG file, up to the first scan."""
    end = 2
    while marker := _MARKER.search(data, end):
        start = marker.end() + 2
        end = start - 2 + int.from_bytes(data[start - 2 : start], "big")
        yield marker[1][0], start, end


def _read_huffman_tables(segment: bytes, codes: np.ndarray) -> None:
    """Fill rows of `codes`, see `Scan.long`."""
    while segment:
        table, counts = segment[0], np.frombuffer(segment, dtype=np.uint8, count=16, offset=1)
        symbols = np.frombuffer(segment, dtype=np.uint8, count=counts.sum(), offset=17)
        lengths = np.repeat(np.arange(1, 17), counts)
        # codes are given out in order: each covers all 16-bit words that begin with it
        words = np.repeat(lengths << 8 | symbols, 1 << (16 - lengths))
        codes[(table >> 4) * 4 + (table & 15), : len(words)] = words
        segment = segment[17 + len(symbols) :]


def _inverse_16() -> np.ndarray:
    """(8 frequencies, 16 points) int32 inverse cosine transform of 13 bits, as libjpeg 9 multiplies it out."""
    frequencies, points = np.arange(8)[:, None], np.arange(16)
    matrix = np.cos((2 * points + 1) * frequencies * np.pi / 32) * np.where(frequencies, math.sqrt(2), 1)
    matrix = np.rint(matrix * 2**FRACTION_BITS).astype(np.int32)
    for point, frequency, error in ROUNDED_OTHERWISE:
        matrix[frequency, point] += error
        matrix[frequency, 15 - point] += error * (-1) ** frequency
    return matrix


_INVERSE = _inverse_16()


@numba.njit(nogil=True, cache=True)
def _read_block(stream, reader, short, long, tables, previous, quanta, columns):
    """Read a block's coefficients; add them to `columns` (8 frequencies across, 16 points down), half inverted.

    `reader` holds the bits read ahead, their number, and the next byte's position. Blocks without `quanta` are skipped.
    Returns the DC coefficient, and 1 + the highest frequency across: 0 if the stream is damaged.
    """
    bits, count, position = reader[0], reader[1], reader[2]
    used, k = 1, 0
    while k < 64:
        if count < 32:
            if position + 4 > stream.size:
                return previous, 0
            for _ in range(4):
                bits = (bits << 8) | _i64(stream[position])
                position += 1
            count += 32
        table = tables[1 if k else 0]
        word = (bits >> (count - 16)) & 0xFFFF
        code = _i64(short[table, word >> (16 - _SHORT)])
        code = code if code else _i64(long[table, word])
        if code == 0:
            return previous, 0
        count -= code >> 8
        run, size = (code >> 4) & 15, code & 15
        if k and size == 0 and run != 15:
            break
        k += run
        if k > 63:
            return previous, 0
        value = (bits >> (count - size)) & ((1 << size) - 1)
        count -= size
        value -= 0 if value >= (1 << size) >> 1 else (1 << size) - 1
        if k == 0:
            value += previous
            previous = value
        if quanta.size:
            u, v = _ZIGZAG[k] // 8, _ZIGZAG[k] % 8
            used = max(used, v + 1)
            value = _i32(value * quanta[_ZIGZAG[k]])
            for y in range(16):
                columns[v, y] = _i32(columns[v, y] + _i32(value * _INVERSE[u, y]))
        k += 1
    reader[0], reader[1], reader[2] = bits, count, position
    return previous, used


@numba.njit(nogil=True, cache=True)
def _transform_rows(columns, used, left, strip):
    """Write the 16x16 block of `columns` into `strip` (16, W), from column `left` on, as chroma minus 128."""
    shift = FRACTION_BITS + PASS1_BITS + 3
    total = np.empty(16, _i32)
    for y in range(16):
        total[:] = _i32(1 << (shift - 1))
        for v in range(used):
            value = _i32(columns[v, y] >> _i32(FRACTION_BITS - PASS1_BITS))
            for x in range(16):
                total[x] = _i32(total[x] + _i32(value * _INVERSE[v, x]))
        for x in range(16):
            strip[y, left + x] = min(max(_i32(total[x] >> _i32(shift)), _i32(-128)), _i32(127))


@numba.njit(nogil=True, cache=True)
def _to_rgb(luma, blue, red, pixels):
    """Fill a row of pixels, red in the lowest byte, by libjpeg's 16-bit fixed point (jdcolor.c)."""
    half, low, high = _i32(1 << 15), _i32(0), _i32(255)
    for x in range(luma.size):
        y, cb, cr = _i32(luma[x]), blue[x], red[x]
        r = _i32(y + _i32(_i32(_i32(_i32(91881) * cr) + half) >> _i32(16)))
        g = _i32(y + _i32(_i32(_i32(half - _i32(_i32(22553) * cb)) - _i32(_i32(46802) * cr)) >> _i32(16)))
        b = _i32(y + _i32(_i32(_i32(_i32(116130) * cb) + half) >> _i32(16)))
        r, g, b = min(max(r, low), high), min(max(g, low), high), min(max(b, low), high)
        pixels[x] = _i32(_i32(r | _i32(g << _i32(8))) | _i32(b << _i32(16)))


@numba.njit(nogil=True, cache=True)
def _add_chroma(stream, starts, interval, short, long, tables, quanta, luma, pixels):
    """Fill `pixels` (H, W) from `luma` (H, W) and the chroma of a scan; False if the scan is damaged.

    One thread: in a data worker, the others have work of their own.
    """
    height, width = luma.shape
    across = (width + 15) // 16
    strips, columns = np.empty((2, 16, across * 16), _i32), np.empty((8, 16), _i32)
    reader, previous = np.zeros(3, _i64), np.zeros(3, _i64)
    for macroblock in range((height + 15) // 16 * across):
        if macroblock % interval == 0:
            reader[:], previous[:] = 0, 0
            reader[2] = starts[macroblock // interval]
        top, left = macroblock // across * 16, macroblock % across * 16
        for block in range(6):  # four of luma, two of chroma
            component = max(block - 3, 0)
            if component:
                columns[:] = _i32(1 << (FRACTION_BITS - PASS1_BITS - 1))
            wanted = quanta[component - 1] if component else quanta[0, :0]
            previous[component], used = _read_block(
                stream, reader, short, long, tables[component], previous[component], wanted, columns
            )
            if used == 0:
                return False
            if component:
                _transform_rows(columns, used, left, strips[component - 1])
        if left + 16 >= width:
            for y in range(top, min(top + 16, height)):
                _to_rgb(luma[y], strips[0, y - top], strips[1, y - top], pixels[y])
    return True
