"""Tables of text, and the table of what a run's steps took."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger("qat")


def format_table(headers: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> str:
    """Lay out a table; columns named in `right` are aligned to the right."""
    from prettytable import PrettyTable

    table = PrettyTable(list(headers), align="l")
    for header in right:
        table.align[header] = "r"
    table.add_rows([list(row) for row in rows])
    return table.get_string()


def sized(path: Path) -> str:
    """A file's path and size, for people."""
    return f"{path} ({path.stat().st_size / 2**20:.1f} MiB)"


class Steps:
    """Seconds, and on a GPU the peak memory, of each named step of a run."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float | None]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block, waiting for the GPU at its end; a block that raises is left out."""
        logger.info("%s ...", name)
        if cuda := _cuda_in_use():
            cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if cuda := _cuda_in_use():
            cuda.synchronize()
        peak = cuda.max_memory_allocated() / 2**20 if cuda else None
        self.rows.append((name, time.perf_counter() - start, peak))

    def table(self) -> str:
        """Lay out the steps so far and their total."""
        total = sum(seconds for _, seconds, _ in self.rows)
        peaks = [peak for *_, peak in self.rows if peak is not None]
        rows = [*self.rows, ("total", total, max(peaks, default=None))]
        cells = [(name, f"{seconds:.1f}", "-" if peak is None else f"{peak:.0f}") for name, seconds, peak in rows]
        headers = ("step", "seconds", "peak GPU MiB")
        width = 3 if peaks else 2
        return format_table(headers[:width], [row[:width] for row in cells], right=headers[1:width])


def _cuda_in_use() -> Any:
    """Return `torch.cuda` if this process uses it already, without loading torch for the question."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None
