"""A report's folder: `report.json` and the page made from it."""

import json
from pathlib import Path
from typing import Any

from lean.errors import QuantizationError
from lean.export.folder import all_or_none
from lean.files import check_writable, explained
from lean.report.page import render
from lean.report.schema import check

DATA, PAGE = "report.json", "index.html"


def check_folder(folder: Path, *, force: bool = False, add: bool = False, what: str = "--report") -> None:
    """Refuse, before a long run, a folder that a report can't be written to at its end; makes it.

    Args:
        force: what is in it may be replaced.
        add: it holds a report that is added to.

    Raises:
        QuantizationError: it is a file, holds something, holds no report to add to, or can't be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise QuantizationError(f"{what} {folder}: is a file, name a folder")
    if add:
        read(folder)
    elif not force and folder.is_dir() and any(folder.iterdir()):
        raise QuantizationError(f"{what} {folder}: exists and is not empty; --force replaces the report in it")
    for name in (DATA, PAGE):
        check_writable(folder / name, what)


def read(folder: Path) -> dict[str, Any]:
    """The report in a folder.

    Raises:
        QuantizationError: there is none, or it is damaged.
    """
    path = folder / DATA
    try:
        report = json.loads(path.read_bytes())
    except OSError as error:
        raise QuantizationError(f"{path}: no report can be read there ({error.strerror})") from None
    except ValueError as error:
        raise QuantizationError(f"{path} is not valid JSON: {error}") from None
    check(report, str(path))
    return report


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write a report's data and page, both or none.

    Raises:
        QuantizationError: the data is not a report's, or the folder can't be written to; older files are as they were.
    """
    check(report)
    page = render(report).encode()
    data = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False).encode()
    with all_or_none(folder) as staging:
        for name, content in ((DATA, data), (PAGE, page)):
            with explained(folder / name):
                (staging / name).write_bytes(content)
