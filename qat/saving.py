"""How `qat/ptq.py` writes its result: one run at a time."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lean.distributed import rank
from lean.lock import sole_writer


def claim(save: Path) -> AbstractContextManager[None]:
    """Keep other runs from writing this result for the length of a `with` block; the first process does it for all.

    Raises:
        QuantizationError: another run is writing it.
    """
    return sole_writer(save) if rank() == 0 else nullcontext()
