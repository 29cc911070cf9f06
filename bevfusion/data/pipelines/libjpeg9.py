"""Decode JPEG files to the pixels that Pillow's wheels before 9.0 gave, bit for bit.

Those wheels held the IJG's libjpeg 9, today's hold libjpeg-turbo. Both decode luma alike; where chroma is stored at
half the resolution, libjpeg-turbo interpolates it, and libjpeg 9 evaluates each 8x8 chroma block at 16x16 points
(jdmaster.c, jidctint.c of libjpeg 9). Colours differ by a few levels at edges. The original BEVFusion ran on a Pillow
of that age; this reproduces its pixels at several times the cost of decoding.
"""

import functools
import math

import numpy as np
from PIL import Image

from bevfusion.errors import InputError

FRACTION_BITS = 13  # of the integer inverse transform
PASS1_BITS = 2
# entries of the upper half of the inverse transform which libjpeg's factorisation does not round to nearest
ROUNDED_OTHERWISE = (
    (0, 6, -1), (2, 2, 1), (2, 5, 1), (3, 7, 1), (5, 2, -1), (5, 5, -1), (6, 3, 1), (7, 6, 1),
)  # fmt: skip


def decode_libjpeg9(path: str) -> Image.Image:
    """RGB image of the JPEG file `path`.

    Blocks at the right and lower edge that the image fills only in part are extrapolated.

    Raises:
        InputError: the file is not a JPEG in YCbCr with chroma at half the resolution in both directions.
        OSError: the file is damaged.
    """
    with Image.open(path) as image:
        if image.format != "JPEG" or [tuple(layer[1:3]) for layer in image.layer] != [(2, 2), (1, 1), (1, 1)]:
            raise InputError(f"image {path} is not a 4:2:0 JPEG file; load it with decoder=pillow")
        size, tables = image.size, [image.quantization[layer[3]] for layer in image.layer]
        image.draft("YCbCr", size)
        luma = np.asarray(image)[..., 0].astype(np.int32)
    with Image.open(path) as image:
        # at half size, libjpeg-turbo decodes the chroma blocks as they are stored
        image.draft("YCbCr", (-(-size[0] // 2), -(-size[1] // 2)))
        half = np.asarray(image)
    height, width = luma.shape
    blue, red = (_upsample(half[..., c], tables[c])[:height, :width] for c in (1, 2))
    return Image.fromarray(_to_rgb(luma, blue, red))


def _upsample(plane: np.ndarray, table: list[int]) -> np.ndarray:
    """(H, W) chroma of 8x8 blocks evaluated at 16x16 points: (2H, 2W) at least, int32, minus 128."""
    quantum = np.array(table, dtype=np.float32).reshape(8, 8)
    height, width = (-(-length // 8) for length in plane.shape)
    padding = [(0, blocks * 8 - length) for blocks, length in zip((height, width), plane.shape, strict=True)]
    blocks = np.pad(plane, padding, mode="edge").astype(np.float32) - 128
    blocks = blocks.reshape(height, 8, width, 8).transpose(0, 2, 1, 3)
    forward = _cosines()
    # the plane is the rounded inverse transform of whole multiples of the quanta, so that rounding finds them again
    coefficients = np.rint(forward @ blocks @ forward.T / quantum) * quantum
    inverse = _inverse_16x16()
    # float64 holds these integers exactly
    columns = np.floor(
        (inverse @ coefficients + 2.0 ** (FRACTION_BITS - PASS1_BITS - 1)) * 2.0 ** (PASS1_BITS - FRACTION_BITS)
    )
    shift = FRACTION_BITS + PASS1_BITS + 3
    values = np.floor((columns @ inverse.T + 2.0 ** (shift - 1)) * 2.0**-shift)
    values = np.clip(values, -128, 127).astype(np.int32)
    return values.transpose(0, 2, 1, 3).reshape(height * 16, width * 16)


@functools.cache
def _cosines() -> np.ndarray:
    """(8, 8) orthonormal forward cosine transform."""
    matrix = np.sqrt(2 / 8) * np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)


@functools.cache
def _inverse_16x16() -> np.ndarray:
    """(16, 8) inverse cosine transform in 13-bit integers, as libjpeg 9 multiplies it out."""
    rows, columns = np.arange(16)[:, None], np.arange(8)
    matrix = np.cos((2 * rows + 1) * columns * np.pi / 32) * np.where(columns, math.sqrt(2), 1)
    matrix = np.rint(matrix * 2**FRACTION_BITS)
    for row, column, error in ROUNDED_OTHERWISE:
        matrix[row, column] += error
        matrix[15 - row, column] += error * (-1) ** column
    return matrix


def _to_rgb(luma: np.ndarray, blue: np.ndarray, red: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of YCbCr planes, chroma minus 128, in libjpeg's 16-bit fixed point (jdcolor.c)."""
    level = np.arange(-128, 128)
    half = 1 << 15
    red_of = (91881 * level + half) >> 16
    blue_of = (116130 * level + half) >> 16
    rgb = np.empty((*luma.shape, 3), dtype=np.int32)
    rgb[..., 0] = luma + red_of[red + 128]
    rgb[..., 1] = luma + ((half - 22554 * blue - 46802 * red) >> 16)
    rgb[..., 2] = luma + blue_of[blue + 128]
    return np.clip(rgb, 0, 255, out=rgb).astype(np.uint8)
