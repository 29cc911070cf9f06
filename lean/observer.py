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

    def check_finite(self, frame: str) -> None:
        """Raise QuantizationError if NaN or infinity was seen, naming the quantizers and `frame`; synchronises once."""
        special = torch.stack([self._counts[:, slot] for slot in (NAN, POS_INF, NEG_INF)], dim=1).tolist()
        bad = [(name, counts) for name, counts in zip(self._names, special, strict=True) if any(counts)]
        if bad:
            (name, (nan, pos_inf, neg_inf)), more = bad[0], f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise QuantizationError(
                f"{name}{more} got {nan} NaN, {pos_inf} +Inf and {neg_inf} -Inf values in {frame}: "
                "check that frame and the checkpoint"
            )


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
