"""What a long run has found so far, one line of JSON each: an interrupted or killed run loses one line at most."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lean.errors import QuantizationError
from lean.statistics import Statistics

HEAD = "made_of"


class Journal:
    """Rows by key, in memory and in a file that each new one is appended to.

    Args:
        path: the file; what was there is replaced unless it is gone on from.
        made_of: what the rows depend on, see `lean.statistics.Statistics`.
        resume: go on from the file if it is there.

    Raises:
        QuantizationError: the file comes from another run, is no journal, or can't be written.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any], resume: bool = False):
        self.path = path
        self.rows: dict[str, Any] = {}
        length = 0
        if resume and path.exists():
            head, self.rows, length = _read(path)
            Statistics({}, 0, made_of if head is None else head).refuse_other(made_of, f"--resume {path}")
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, length)
        except OSError as error:
            raise QuantizationError(f"{path}: can't write there ({error.strerror}); choose another folder") from None
        if not length:
            self._write({HEAD: made_of})

    def add(self, key: str, row: Any) -> None:
        """Keep a row, whole or not at all; raises OSError if the disk is full."""
        self._write({"key": key, "row": row})
        self.rows[key] = row

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(self._file, data) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _read(path: Path) -> tuple[dict | None, dict[str, Any], int]:
    """What rows are made of (None: nothing was written), the rows, and the bytes of whole lines: one may be torn."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        head, *entries = map(json.loads, whole or [b'{"made_of": null}'])
        return head[HEAD], {entry["key"]: entry["row"] for entry in entries}, sum(map(len, whole))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantizationError(f"--resume {path}: can't be read ({error!r}); remove it to start anew") from error
