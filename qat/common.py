"""Plumbing shared by the scripts of this folder: errors, logging, repeatability and devices.

Importing it costs nothing but the standard library, so that ``--help`` answers at once.
"""

import argparse
import atexit
import errno
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import mmcv
    import torch

_USERS_OS_ERRORS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
}

logger = logging.getLogger("qat")


class UsageError(ValueError):
    """An option that can't be used here: says which, why, and what to do, in one line."""


class VerificationError(Exception):
    """A result that is not what it should be, through no fault of the input: says what differs, in one line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever a Ctrl-C does happens, and the exit status tells them apart."""


def load_config(args: argparse.Namespace) -> "mmcv.Config":
    """Load ``args.config`` with ``--dataset-root`` and ``--cfg-options`` applied, in that order.

    Raises:
        InputError: see `bevfusion.config.load_config`.
        UsageError: a section that every script needs is missing, or the seed is none.
    """
    from bevfusion.config import load_config as load

    root = args.dataset_root
    options = [] if root is None else [f"dataset_root={json.dumps(os.path.join(root, ''), ensure_ascii=False)}"]
    cfg = load(args.config, [*options, *args.cfg_options])
    data = cfg.get("data")
    sections = {"model": cfg.get("model"), "data": data}
    if isinstance(data, dict):
        sections |= {f"data.{part}": data.get(part) for part in ("train", "val", "test")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UsageError(f"config {args.config}: {name} should be a section, not {section!r:.60}")
    seed = cfg.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UsageError(f"config {args.config}: seed should be a whole number from 0 to 2^32 - 1, not {seed!r:.60}")
    return cfg


def choose_device(name: str) -> "torch.device":
    """Turn ``auto``, ``cuda`` or ``cpu`` into a device.

    Raises:
        UsageError: ``cuda`` is asked for and torch sees none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here; use --device cpu, "
            "or run qat/doctor.py to find out why"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_workers(asked: int | None, device: "torch.device") -> int:
    """Number of data loading processes: as asked, else one per core, at most 16 for a GPU and one for the CPU."""
    if asked is not None:
        return asked
    return min(os.cpu_count() or 1, 16) if device.type == "cuda" else 1


def make_repeatable(seed: int, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch, and keep float32 products exact (no TF32) and sparse ones in one order.

    `deterministic` also makes torch choose repeatable algorithms where it has any.
    """
    import random

    import numpy as np
    import torch

    from bevfusion.ops.repeatable import keep_to_one_order_of_sums

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    keep_to_one_order_of_sums()
    if deterministic:
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def set_up_logging(args: argparse.Namespace) -> None:
    """Send our log to stderr (warnings; -v: steps; -vv: everything; -q: errors only), and all of it to ``--log-file``.

    Call it before the heavy imports: it also keeps off the terminal what libraries announce when they are imported
    (their Python warnings are shown with -v).

    Raises:
        UsageError: the log file can't be written.
    """
    level = logging.ERROR if args.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    terminal = logging.StreamHandler()
    terminal.setLevel(level)
    terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    terminal.addFilter(lambda record: record.name != "py.warnings" or args.verbose > 0)
    handlers = [terminal, *([_log_file(Path(args.log_file))] if args.log_file else [])]
    # Not on the root logger: absl, which pytorch-quantization imports, takes that over.
    for name in ("bevfusion", "lean", "qat", "py.warnings"):
        ours = logging.getLogger(name)
        ours.setLevel(logging.DEBUG)
        ours.propagate = False
        ours.handlers = handlers
    logging.captureWarnings(True)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # on a function that mmcv calls
    with suppress(ImportError):
        from absl import logging as absl_logging

        absl_logging.set_verbosity(absl_logging.ERROR)  # a line for each calibrator that is switched off


def _log_file(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--log-file {path}: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries in a `with` block, and don't search what they bring for garbage while it grows."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call a script's `main` and exit with what it returns (None: 0).

    Bad input becomes one line on stderr and status 2, a result that fails its verification status 3, an interruption
    130, SIGTERM 143. A bug keeps its traceback.
    """
    atexit.register(gc.freeze)  # or the interpreter's end would search all libraries for garbage, which takes seconds
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except VerificationError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(3)
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        logger.debug("stopped by bad input", exc_info=True)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> NoReturn:
    raise Terminated


def _explain(error: Exception) -> str | None:
    """Return one line for an error that a user can mend, None for a bug."""
    # Looked up among the modules loaded so far: importing them here could fail, or hide a failure to import them.
    expected = [(__name__, "UsageError"), ("bevfusion.errors", "InputError"), ("lean.errors", "QuantizationError")]
    expected.append(("torch", "OutOfMemoryError"))
    types = tuple(getattr(sys.modules[module], name) for module, name in expected if module in sys.modules)
    if isinstance(error, types):
        text = str(error)
        if "\nOriginal Traceback" in text:  # it came from a data loading process
            text = text.strip().rpartition("\n")[2].partition(": ")[2]
        return " ".join(text.split())
    if isinstance(error, RuntimeError) and "CUDA error: out of memory" in str(error):  # not even room for a program
        return "the GPU has no memory left: end other programs on it (nvidia-smi lists them), or use --device cpu"
    if isinstance(error, OSError) and error.errno in _USERS_OS_ERRORS and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}; free some space and run again"
    return None
