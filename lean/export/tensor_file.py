"""The runtime's `.tensor` files: one tensor each, little-endian.

int32 magic number, number of dimensions and type code; int32 dimensions; the values in C order. The codes are those of
the runtime's tensor library.
"""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from lean.errors import QuantizationError
from lean.files import atomic_write

MAGIC = 0x33FF1101
CODES = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(
        ("int32", "float16", "float32", "int64", "uint64", "uint32", "int8", "uint8", "uint16", "int16"), start=1
    )
}
_HEADER = np.dtype("<i4")


def write_tensor(file: str | Path, tensor: Tensor | np.ndarray) -> None:
    """Write `tensor` (any shape, one of the ten types of `CODES`).

    Raises:
        QuantizationError: the format has no code for its type, or the file can't be written.
    """
    array = tensor.detach().cpu().numpy() if isinstance(tensor, Tensor) else np.asarray(tensor)
    code = next((code for code, dtype in CODES.items() if dtype == array.dtype.newbyteorder("<")), None)
    if code is None:
        known = ", ".join(dtype.name for dtype in CODES.values())
        raise QuantizationError(f"{file}: a .tensor file can't hold {array.dtype}; convert it to one of {known}")
    with atomic_write(Path(file)) as out:
        out.write(np.array([MAGIC, array.ndim, code, *array.shape], _HEADER).tobytes())
        out.write(array.astype(CODES[code], copy=False).tobytes())


def read_tensor(file: str | Path) -> np.ndarray:
    """Read what `write_tensor` or the runtime wrote.

    Raises:
        QuantizationError: the file is missing, is no `.tensor` file, or is shorter or longer than its header says.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise QuantizationError(f"{file}: {error.strerror}") from None
    head = np.frombuffer(data[:12], _HEADER) if len(data) >= 12 else (0, 0, 0)
    if head[0] != MAGIC:
        raise QuantizationError(f"{file} is no .tensor file: it doesn't begin with the magic number {MAGIC:#x}")
    dims, dtype = int(head[1]), CODES.get(int(head[2]))
    start = 12 + 4 * dims
    if dtype is None or dims < 0 or len(data) < start:
        raise QuantizationError(f"{file} is damaged: {dims} dimensions, type code {head[2]}")
    shape = tuple(np.frombuffer(data[12:start], _HEADER).tolist())
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or len(data) - start != expected:
        raise QuantizationError(
            f"{file} is damaged: {dtype.name} {shape} needs {expected} bytes, {len(data) - start} are there"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
