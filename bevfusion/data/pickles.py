"""Load pickles of plain data without running any code that they name."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from bevfusion.errors import InputError


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 stores bytes; only the one encoding that pickle uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode(encoding)


def _allowed() -> dict[tuple[str, str], Any]:
    """What a pickle may name: containers and numbers of Python, arrays and scalars of numpy 1 and 2."""
    kinds = (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, range, set, slice, str, tuple)
    table = {(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in kinds}
    table |= {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _encode}
    # numpy moved `core` to `_core` in 2.0: its own reductions tell where the three helpers are today
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
        table[f"{core}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
        table[f"{core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]
    return table


class _PlainUnpickler(pickle.Unpickler):
    allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise InputError(f"it names {module}.{name}; only Python's containers and numpy arrays are loaded")
        return self.allowed[module, name]


def load_pickle(path: str | Path) -> Any:
    """Object stored in the pickle `path`, made of Python's containers and numbers and of numpy arrays only.

    Raises:
        InputError: the file is missing, damaged, or names any other class or function.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except InputError as error:
        raise InputError(f"{path} is refused: {error}") from None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a complete pickle file ({reason}); make it anew") from error
