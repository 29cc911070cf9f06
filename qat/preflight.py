"""What is looked at before the first frame runs, and the plan of a run."""

import hashlib
import logging
import resource
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from bevfusion.data import frames_of, unreadable_frames
from bevfusion.errors import InputError
from lean.distributed import rank
from lean.errors import QuantizationError
from lean.fold import foldable
from lean.insert import Inserted
from lean.matching import matches
from lean.recipe import Recipe
from lean.sharing import sharing_groups
from lean.status import layer_status
from lean.switches import quantized_layers
from qat import tables
from qat.frames import Frames
from qat.summary import float_lines

MIB = 2**20
STATISTICS = 100 * 1024  # bytes a quantizer, uncompressed
COPIES = 2  # of the weights that a run writes: the pickle and the safe format
LEAST_GPU_MIB, USUAL_GPU_MIB = 512, 3 * 1024  # free beside the weights: below the first it can't work

logger = logging.getLogger("qat")


def preflight(model: nn.Module, frames: Frames | None, save: Path, device: torch.device) -> None:
    """Look at what a long run needs: space for its result, memory of the GPU, the files of all its frames.

    Raises:
        InputError: frames can't be opened, unless they are to be skipped.
        QuantizationError: the disk or the GPU is too full.
    """
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_space(save, size, len(quantized_layers(model)) * STATISTICS)
    if device.type == "cuda":
        check_gpu(*torch.cuda.mem_get_info(device), size)
    if frames is not None and rank() == 0:
        check_frames(frames)


def check_space(save: Path, weights: int, statistics: int) -> None:
    """Refuse a disk, or a limit on the size of files, that is too small for the result (bytes).

    Raises:
        QuantizationError: says how much is needed.
    """
    need, free = COPIES * weights + statistics + 16 * MIB, shutil.disk_usage(save.parent).free
    if free < need:
        raise QuantizationError(
            f"--save {save}: about {need // MIB} MiB are needed, but {free // MIB} MiB are free; free some space"
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < weights:
        raise QuantizationError(
            f"--save {save}: files may have {limit // MIB} MiB here (ulimit -f), the weights alone need "
            f"{weights // MIB} MiB"
        )


def check_gpu(free: int, total: int, weights: int) -> None:
    """Refuse a GPU without room for the weights and the least of work, warn of one that is rather full (bytes).

    Raises:
        QuantizationError: it can't work.
    """
    left = (free - weights) // MIB
    state = f"{free // MIB} of {total // MIB} MiB of the GPU are free (nvidia-smi shows who has the rest)"
    if left < LEAST_GPU_MIB:
        raise QuantizationError(f"{state}, too few for this model: end other programs, or use --device cpu")
    if left < USUAL_GPU_MIB:
        logger.warning("%s: a full-size model may need more", state)


def check_frames(frames: Frames) -> None:
    """Open every file of the chosen frames.

    Raises:
        InputError: some can't be opened and are not to be skipped; names the first and how many there are.
    """
    bad = unreadable_frames(frames_of(frames.dataset), frames.indices)
    if not bad:
        return
    first, count = next(iter(bad.values())), f"{len(bad)} of {len(frames.indices)} frames can't be opened"
    if not frames.skip_bad:
        more = f" ({count}; --on-bad-frame skip replaces them)" if len(bad) > 1 else ""
        raise InputError(f"{first}{more}")
    logger.warning("%s and will be replaced; the first: %s", count, first)


def left_float(model: nn.Module, inserted: Inserted, recipe: Recipe, patterns: Sequence[str]) -> dict[str, str]:
    """Layers of quantised branches that are, or will be, in floating point, with the reason; `patterns`: --disable."""
    reasons = dict(inserted.left_float)
    for what, globs in (("disabled by the recipe", recipe.disable), ("--disable", patterns)):
        for pattern in globs:
            found = {name: f"{what} ({pattern})" for name in quantized_layers(model) if matches(name, [pattern])}
            reasons = found | reasons
    return reasons


def plan(model: nn.Module, floats: Mapping[str, str], frames: Frames | None, save: Path) -> str:
    """Lay out what a run will do: its layers (int8 or float, shared scales, folded norms), frames and result."""
    norms = {pair.conv: pair.norm for pair in foldable(model)}
    leaders = {name: group[0] for group in sharing_groups(model) for name in group[1:]}
    rows = [
        (
            layer.name,
            layer.kind.removeprefix("Quant"),
            "float" if layer.name in floats else "int8",
            leaders.get(layer.name, "-"),
            norms.get(layer.name, "-").removeprefix(f"{layer.name.rpartition('.')[0]}."),
        )
        for layer in layer_status(model)
    ]
    table = tables.format_table(("layer", "kind", "computes in", "input scale of", "folds"), rows)
    others = [f"{norm} into {conv} (float)" for conv, norm in norms.items() if conv not in quantized_layers(model)]
    quantised = sum(row[2] == "int8" for row in rows)
    lines = [
        table,
        f"{quantised} layers in INT8; {len(norms)} batch normalisations are folded",
        *(f"folded besides: {other}" for other in others),
        float_lines(floats),
        _frame_lines(frames) if frames else "frames: none, ranges come from kept statistics",
        f"result: {save}",
        "dry run: nothing was computed",
    ]
    return "\n".join(lines)


def _frame_lines(frames: Frames) -> str:
    tokens = frames.tokens if len(frames.tokens) <= 8 else (*frames.tokens[:4], "…", *frames.tokens[-2:])
    digest = hashlib.sha256("\n".join(frames.tokens).encode()).hexdigest()[:16]
    bad = f"; {len(frames.spares)} others may replace what can't be read" if frames.skip_bad else ""
    head = f"frames: {len(frames.tokens)} of {frames.available}, seed {frames.seed}, sha256 of their tokens {digest}…"
    return f"{head}{bad}\n  {', '.join(tokens)}"
