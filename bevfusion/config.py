"""Load a YAML config with torchpack's inheritance by folder, overrides, and BEVFusion's `${…}` expressions."""

import difflib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import yaml
from torchpack.utils.config import Config

from bevfusion.errors import InputError
from bevfusion.expressions import evaluate

logger = logging.getLogger(__name__)

_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def load_config(path: str | Path, options: Sequence[str] = ()) -> mmcv.Config:
    """Load the config at `path`: inherited defaults first, then the file, then `options`, then its expressions.

    Every ``default.yaml`` in the folders above the file is read, the topmost first; a later mapping is merged into an
    earlier one, any other value replaces it. An option is ``key=value``: the key is dotted and may index lists
    (``test_pipeline.2.sweeps_num``), the value is YAML.

    Follows `torchpack.utils.config` and the recursive evaluation of BEVFusion's own tools.

    Raises:
        InputError: a file is missing or not YAML, an option is malformed, or an expression can't be evaluated.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config {path}: no such file")
    config = Config()
    for source in _sources(path):
        logger.debug("config: %s", source)
        _merge(config, source)
    for option in options:
        _override(config, option)
    try:
        resolved = evaluate(config)
    except InputError as error:
        raise InputError(f"config {path}: {error}") from None
    return mmcv.Config(resolved, filename=str(path))


def _sources(path: Path) -> list[Path]:
    """List the files to merge, in order. A link in the path counts as the folder it is named."""
    absolute = Path(os.path.abspath(path))
    defaults = [folder / f"default{path.suffix}" for folder in reversed(absolute.parents)]
    return [file for file in defaults if file.is_file() and file != absolute] + [path]


def _merge(config: Config, source: Path) -> None:
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
        if content is not None and not isinstance(content, dict):
            raise InputError(f"config {source}: expected 'key: value' lines at the top, found {type(content).__name__}")
        config.update(_unshared(content or {}))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {source} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"config {source}: an alias (*) contains itself") from None
    except OSError as error:
        raise InputError(f"config {source} can't be read: {error.strerror}") from None


def _unshared(value: Any) -> Any:
    """Copy what an alias shares, so that overriding it in one place leaves the others alone."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _override(config: Config, option: str) -> None:
    """Set the value that `option` ("a.b=c") names; sections that don't exist are made, as torchpack does."""
    key, equals, text = option.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise InputError(f"option {option!r}: expected KEY=VALUE, for example data.samples_per_gpu=2")
    section: Any = config
    for depth, name in enumerate(names[:-1], start=1):
        index = _index(section, name, option)
        if isinstance(section, dict) and section.get(index) is None:
            section[index] = Config()
        section = section[index]
        if not isinstance(section, dict | list):
            raise InputError(f"option {option!r}: {'.'.join(names[:depth])} is {section!r}, not a section")
    index = _index(section, names[-1], option)
    if isinstance(section, dict) and index not in section:
        near = ", ".join(difflib.get_close_matches(str(index), map(str, section), 3)) or "none"
        logger.warning("option %s: the config had no such key; nearest: %s", option, near)
    section[index] = _parse_value(text, option)


def _index(section: dict | list, name: str, option: str) -> str | int:
    if isinstance(section, dict):
        return name
    if not name.isdecimal() or int(name) >= len(section):
        raise InputError(f"option {option!r}: {name!r} is no index of a list of {len(section)}")
    return int(name)


def _parse_value(text: str, option: str) -> Any:
    if _EXPONENT_FLOAT.fullmatch(text):  # YAML 1.1 takes 1e-3 for a text
        return float(text)
    try:
        return yaml.safe_load(text) if text != "None" else None
    except yaml.YAMLError as error:
        raise InputError(f"option {option!r}: the value is not YAML: {' '.join(str(error).split())}") from None
