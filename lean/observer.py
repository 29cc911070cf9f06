"""Collects the statistics of many quantizers, in place of pytorch-quantization's calibrators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from pytorch_quantization.calib.calibrator import _Calibrator
from pytorch_quantization.nn import TensorQuantizer
from torch import Tensor

from lean import kernels
from lean.amax import choose_amax
from lean.errors import QuantizationError
from lean.histogram import NAN, NEG_INF, POS_INF, SLOTS, Histogram


class HistogramObserver(_Calibrator):
    """The `_calibrator` of one TensorQuantizer; counts into its row of the state that all observers share."""

    def __init__(self, quantizer: TensorQuantizer, name: str, observers: Observers, row: int):
        super().__init__(quantizer.num_bits, quantizer.axis, quantizer.unsigned)
        self._name, self._observers, self._row = name, observers, row

    def collect(self, x: Tensor) -> None:
        """Count the values of `x` (any float dtype, shape and strides); doesn't synchronise with the device."""
        kernels.observe(x, *self._observers.state(self._row, x.device))

    @property
    def statistics(self) -> Histogram:
        """What was collected since the last reset."""
        return self._observers.statistics()[self._name]

    def reset(self) -> None:
        """Forget what was collected."""
        for part in self._observers.state(self._row):
            part.zero_()

    def compute_amax(self, method: str = "mse", *, percentile: float = 99.99) -> Tensor | None:
        """amax by `lean.amax.choose_amax`, float32, 0-dimensional, on the state's device; None if nothing was seen."""
        statistics = self.statistics
        if statistics.total == 0:
            return None
        settings = {"num_bits": self._num_bits, "unsigned": self._unsigned, "percentile": percentile}
        amax = choose_amax({self._name: statistics}, method, **settings)[self._name]
        return torch.tensor(amax, device=self._observers.state(self._row)[0].device)


class Observers:
    """The statistics of many quantizers in two tensors, so that they are checked, summed and fetched all at once.

    The tensors lie on the device of the first value collected.
    """

    def __init__(self, names: list[str]):
        self._names = names
        self._placed = False
        self._place(torch.zeros(len(names), SLOTS, dtype=torch.int64), torch.zeros(len(names), 2, dtype=torch.int32))

    def _place(self, counts: Tensor, extremes: Tensor) -> None:
        self._counts, self._extremes = counts, extremes
        self._rows = list(zip(counts.unbind(), extremes.unbind(), strict=True))

    def state(self, row: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Counts and extremes of one quantizer, to be changed in place; `device`: where values to count come from."""
        if device is not None and not self._placed:
            self._place(self._counts.to(device), self._extremes.to(device))
            self._placed = True
        return self._rows[row]

    def statistics(self, summed: bool = False) -> dict[str, Histogram]:
        """Copy the statistics to the host, by name; `summed`: over all processes of torch.distributed, if it is in use.

        Sums leave each process's own statistics as they are; every process has to ask for them, with equal quantizers.
        """
        counts, extremes = self._counts, self._extremes
        if summed and dist.is_available() and dist.is_initialized():
            device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
            counts, extremes = (torch.clone(t.to(device)) for t in (counts, extremes))
            dist.all_reduce(counts, dist.ReduceOp.SUM)
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
        rows = zip(np.array(counts.cpu()), np.array(extremes.cpu()), strict=True)
        return {name: Histogram(*row) for name, row in zip(self._names, rows, strict=True)}

    def load(self, statistics: Mapping[str, Histogram]) -> None:
        """Go on from saved statistics.

        Raises QuantizationError naming a quantizer that only one side has.
        """
        unequal = sorted(set(statistics) ^ set(self._names))
        if unequal:
            side = "saved statistics" if unequal[0] in statistics else "model"
            raise QuantizationError(
                f"saved statistics don't fit the model: quantizer {unequal[0]} is only in the {side} "
                f"({len(unequal)} differ); use the config and recipe they were made with"
            )
        for (counts, extremes), name in zip(self._rows, self._names, strict=True):
            counts.copy_(torch.from_numpy(statistics[name].counts))
            extremes.copy_(torch.from_numpy(statistics[name].extremes))

    def special(self) -> Tensor:
        """How many NaN, +Inf and -Inf each quantizer has seen, (N, 3) int64, on the state's device."""
        return torch.stack([self._counts[:, slot] for slot in (NAN, POS_INF, NEG_INF)], dim=1)

    def refuse_special(self, special: Tensor, frame: str) -> None:
        """Raise QuantizationError if any of the counts of `special` is not 0, naming the quantizers and `frame`."""
        bad = [(name, counts) for name, counts in zip(self._names, special.tolist(), strict=True) if any(counts)]
        if bad:
            (name, (nan, pos_inf, neg_inf)), more = bad[0], f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise QuantizationError(
                f"{name}{more} got {nan} NaN, {pos_inf} +Inf and {neg_inf} -Inf values in {frame}: "
                "check that frame and the checkpoint"
            )


class FiniteCheck:
    """Stops at the frame that brought NaN or infinity; on CUDA one frame late, so that the device is not waited for."""

    def __init__(self, observers: Observers):
        self._observers = observers
        self._pending: tuple[str, Tensor, torch.cuda.Event | None] | None = None

    def after(self, frame: str) -> None:
        """Note what was seen up to the end of `frame`, and raise QuantizationError for the frame before it."""
        special, arrived = self._observers.special(), None
        if special.is_cuda:
            special = torch.empty(special.shape, dtype=special.dtype, pin_memory=True).copy_(special, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.finish()
        self._pending = frame, special, arrived
        if arrived is None:
            self.finish()

    def finish(self) -> None:
        """Raise QuantizationError if the last frame brought NaN or infinity."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        frame, special, arrived = pending
        if arrived is not None:
            arrived.synchronize()
        self._observers.refuse_special(special, frame)


def install_observers(quantizers: Mapping[str, TensorQuantizer]) -> Observers:
    """Replace the calibrators of per-tensor quantizers by observers, and return their common statistics.

    quantizers: each object once, under the name it has in errors and saved statistics.
    Raises QuantizationError for a quantizer with an axis: activations have one scale for the whole tensor.
    """
    observers = Observers(list(quantizers))
    for row, (name, quantizer) in enumerate(quantizers.items()):
        if quantizer.axis is not None:
            raise QuantizationError(
                f"{name} is per channel (axis {quantizer.axis}): only per-tensor inputs are observed"
            )
        quantizer._calibrator = HistogramObserver(quantizer, name, observers, row)
    return observers
