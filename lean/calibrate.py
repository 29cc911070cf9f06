"""Calibration: let quantizers observe batches, set the weights' amax, check that every quantizer got one."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import Tensor, nn

from lean.errors import QuantizationError
from lean.observer import Observers, install_observers
from lean.stock import EPSILON
from lean.switches import named_quantizers, quantized_layers, quantizer_flags
from lean.weights import weight_amax

logger = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Any], Any]
AfterBatch = Callable[[int, Any], None]


def run_detector(model: nn.Module, batch: dict) -> Any:
    """Run one batch of an mmdet3d data loader through a (wrapped) detector."""
    return model(return_loss=False, rescale=True, **batch)


def observe(
    model: nn.Module,
    batches: Iterable,
    num_batch: int,
    forward: Forward = run_detector,
    progress: Callable[..., Iterable] | None = None,
    after_batch: AfterBatch | None = None,
) -> int:
    """Run exactly `num_batch` batches (or all, if there are fewer) and let the input quantizers' calibrators see them.

    The model computes in floating point meanwhile; its training flags and quantizers are as before afterwards.

    Args:
        batches: yields what `forward` takes; no more than `num_batch` items are taken from it.
        progress: wraps the iteration like `tqdm(iterable, total=n)`.
        after_batch: called with a batch's number, from 1, and the batch after it ran; by default it refuses what the
            library's calibrators could not count.

    Returns:
        The number of batches that ran.

    Raises:
        QuantizationError: `num_batch` is not positive, there is no batch, or a quantizer met NaN or infinity.
    """
    if num_batch < 1:
        raise QuantizationError(f"calibration needs at least one batch, got {num_batch}")
    total = min(num_batch, len(batches)) if isinstance(batches, Sized) else num_batch
    chosen = itertools.islice(batches, num_batch)
    everyone, observers = named_quantizers(model), input_quantizers(model)
    after_batch, done = after_batch or partial(_refuse_nonfinite, observers), 0
    with (
        torch.no_grad(),
        evaluating(model),
        quantizer_flags(everyone.values(), _if_quant=False, _if_calib=False),
        quantizer_flags(observers.values(), _if_calib=True),
    ):
        for batch in chosen if progress is None else progress(chosen, total=total):
            forward(model, batch)
            done += 1
            after_batch(done, batch)
    if done == 0:
        raise QuantizationError("calibration needs at least one batch, but the data loader is empty")
    if done < num_batch:
        logger.warning("calibrated on %d batches: the data loader has no more (%d were asked for)", done, num_batch)
    return done


def calibrate_weights(model: nn.Module, method: str = "max") -> None:
    """Set every enabled weight quantizer's amax from the weight itself: one per index of its axis.

    A channel of zeros gets the layer's largest amax: it is zero at any scale, and no engine takes a scale of zero.

    Args:
        method: `max` or `mse`.

    Raises:
        QuantizationError: a weight holds NaN or infinity, or the method is unknown.
    """
    for name, layer in quantized_layers(model).items():
        quantizer = getattr(layer, "_weight_quantizer", None)
        if quantizer is None or quantizer._disabled:
            continue
        settings = {"num_bits": quantizer.num_bits, "narrow_range": quantizer.narrow_range}
        try:
            amax = weight_amax(layer.weight, quantizer.axis, method, **settings)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
        largest = amax.max()
        filler = largest if largest > EPSILON else torch.ones_like(largest)
        quantizer.set_amax(torch.where(amax > EPSILON, amax, filler))


def check_calibrated(model: nn.Module) -> None:
    """Refuse a model with an enabled quantizer that has no finite, positive amax, naming it.

    Raises:
        QuantizationError: there is such a quantizer, or no quantizer at all.
    """
    quantizers = named_quantizers(model)
    if not quantizers:
        raise QuantizationError("the model has no quantizers: insert them before calibration")
    bad = [name for name, q in quantizers.items() if not q._disabled and (q.amax is None or not _usable(q.amax))]
    if bad:
        raise QuantizationError(f"no finite, positive amax in {name_some(bad)}; calibrate the model first")


def reset_statistics(model: nn.Module) -> None:
    """Make the calibrator of every input quantizer forget what it saw."""
    for quantizer in input_quantizers(model).values():
        quantizer._calibrator.reset()


@contextmanager
def observing(model: nn.Module) -> Iterator[Observers]:
    """Let every input quantizer collect into common `Observers`, instead of its calibrator, within a `with` block."""
    quantizers = input_quantizers(model)
    with quantizer_flags(quantizers.values(), _calibrator=None):
        yield install_observers(quantizers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode for the length of a `with` block; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters."""
    return next(itertools.chain(model.parameters(), model.buffers())).device


def input_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Every enabled quantizer of a layer's input once, by its first name."""
    inputs = {layer._input_quantizer for layer in quantized_layers(model).values()}
    return {name: q for name, q in named_quantizers(model).items() if q in inputs and not q._disabled}


def name_some(names: list[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _refuse_nonfinite(quantizers: dict[str, TensorQuantizer], number: int, batch: Any) -> None:
    bad = [name for name, quantizer in quantizers.items() if getattr(quantizer._calibrator, "nonfinite", 0)]
    if bad:
        raise QuantizationError(f"NaN or infinity in batch {number} at {name_some(bad)}")


def _usable(amax: Tensor) -> bool:
    return bool((torch.isfinite(amax) & (amax > 0)).all())
