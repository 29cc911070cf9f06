"""What a report holds: the one description of `report.json`, checked before anything is drawn from it.

All of it is JSON: mappings, lists, texts, numbers, None. Every section may be missing: each script knows a part.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lean.errors import QuantizationError

FORMAT, VERSION = "bevfusion-ptq report", 1


@dataclass(frozen=True)
class Maybe:
    """The value may be None."""

    of: Any


@dataclass(frozen=True)
class Text:
    """A text that fits a pattern, or one of some words."""

    pattern: str


STATES = Text("int8|disabled|float")
ROLE = Text("float|int8")
PICTURE = Text("data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")
NUMBER = Maybe(float)

RUN = {
    "script": str,
    "command": str,
    "device": str,
    "steps": [{"name": str, "seconds": float, "peak_mib": NUMBER}],
    "versions": {"*": str},
    "settings": {"*": str},  # how it was run, in words
}
FILE = {"role": ROLE, "name": str, "bytes": int, "sha256": str}
LAYER = {
    "name": str,
    "branch": str,
    "kind": str,
    "shape": Maybe([int]),  # of the weight; None for joins
    "bits": Maybe(int),
    "state": STATES,  # disabled: its quantizers are there and off; float: it never had any
    "why": str,  # it is not in INT8
    "shared_with": [str],  # layers with the same input scale
    "quantizer": Maybe(str),  # of its input, a key of `quantizers`
    "amax": NUMBER,
    "weight_amax": Maybe([float]),  # least and largest over the channels
    "sqnr": NUMBER,  # dB, of its output
    "macs": NUMBER,  # multiply-accumulates a frame
}
QUANTIZER = {
    "amax": NUMBER,
    "levels": int,  # the largest integer
    "total": int,  # values seen
    "zeros": int,
    "max": float,  # largest |x|
    "min": float,  # most negative x, 0 if there is none
    "counts": [float],  # values in equal bins of log |x|, 16 octaves up to `max`
    "below": float,  # values under the lowest bin, zeros left out
    "clipped": NUMBER,  # share of all values with |x| > amax
    "underflow": NUMBER,  # share of all values that become zero and weren't
    "errors": [float],  # squared error over sum of squares at amax = max * 2^(-i / 8)
    "error": NUMBER,  # the same at `amax`
}
ERRORS = {"*": NUMBER}
SCORES = {
    "name": str,
    "role": ROLE,
    "frames": int,
    "mean_ap": float,
    "nds": float,
    "tp_errors": ERRORS,
    "class_aps": {"*": float},
    "class_tp_errors": {"*": ERRORS},
    "truth_counts": {"*": int},
}
TABLE = {  # anything else that is a table, such as a sensitivity analysis
    "id": Text("[a-z][a-z0-9-]*"),
    "title": str,
    "note": str,
    "columns": [{"title": str, "digits": Maybe(int)}],  # digits: None for text
    "rows": [["cell"]],
}
DRIFT = {
    "note": str,
    "columns": [{"title": str, "digits": int}],
    "groups": [{"title": str, "rows": [{"name": str, "values": [NUMBER]}]}],
}
VIEW = {"title": str, "float": PICTURE, "int8": PICTURE, "width": int, "height": int}
REPORT = {
    "format": Text(re.escape(FORMAT)),
    "version": int,
    "title": str,
    "runs": [RUN],
    "files": [FILE],
    "calibration": {"pipeline": str, "seed": int, "tokens": [str]},
    "measured": [str],  # tokens of the frames that SQNR comes from
    "branches": [{"path": str, "sqnr": NUMBER}],
    "layers": [LAYER],
    "quantizers": {"*": QUANTIZER},
    "scores": [SCORES],
    "drift": DRIFT,
    "tables": [TABLE],
    "pictures": [{"token": str, "note": str, "views": [VIEW]}],
    "colours": {"*": Text("#[0-9a-f]{6}")},  # of the classes in the pictures
    "notes": [str],  # what is missing, and why
}
REQUIRED = ("format", "version", "title", "runs")


def check(report: Any, where: str = "report") -> None:
    """Refuse data that is not a report of this version.

    Raises:
        QuantizationError: naming the first value that is missing, unknown or of the wrong kind.
    """
    if not isinstance(report, Mapping) or report.get("format") != FORMAT:
        raise QuantizationError(f"{where} is not a report of this project")
    if report.get("version") != VERSION:
        raise QuantizationError(f"{where} has version {report.get('version')}, this project reads {VERSION}: run anew")
    for key in REQUIRED:
        if key not in report:
            raise QuantizationError(f"{where}: {key} is missing")
    _check({key: value for key, value in report.items() if value is not None}, REPORT, where, partial=True)


def _check(value: Any, spec: Any, where: str, partial: bool = False) -> None:
    if isinstance(spec, Maybe):
        if value is not None:
            _check(value, spec.of, where)
    elif isinstance(spec, Text):
        if not (isinstance(value, str) and re.fullmatch(spec.pattern, value)):
            raise _wrong(where, value, spec.pattern)
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        for index, item in enumerate(value):
            _check(item, spec[0], f"{where}[{index}]")
    elif isinstance(spec, dict):
        _check_mapping(value, spec, where, partial)
    elif spec == "cell":
        if not (value is None or isinstance(value, str) or _is_number(value)):
            raise _wrong(where, value, "a text or a number")
    elif spec is float:
        if not _is_number(value):
            raise _wrong(where, value, "a finite number")
    elif type(value) is not spec:
        raise _wrong(where, value, {int: "a whole number", str: "a text"}[spec])


def _check_mapping(value: Any, spec: dict[str, Any], where: str, partial: bool) -> None:
    if not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        raise _wrong(where, value, "a mapping")
    if "*" in spec:
        spec = dict.fromkeys(value, spec["*"])
    absent = [key for key in spec if key not in value and not partial]
    unknown = [key for key in value if key not in spec]
    if absent or unknown:
        raise QuantizationError(f"{where}.{(absent or unknown)[0]} is {'missing' if absent else 'unknown'}")
    for key, item in value.items():
        _check(item, spec[key], f"{where}.{key}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _wrong(where: str, value: Any, wanted: str) -> QuantizationError:
    text = repr(value)
    return QuantizationError(f"{where} should be {wanted}, is {text if len(text) <= 40 else f'{text[:37]}...'}")
