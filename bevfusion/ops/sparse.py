"""spconv 2 convolutions that run and train wherever their weight lies, and load what they are given."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from spconv.core import ConvAlgo
from spconv.pytorch import SparseConv3d as SpconvSparseConv3d
from spconv.pytorch import SparseConvTensor
from spconv.pytorch import SubMConv3d as SpconvSubMConv3d
from spconv.pytorch.core import IndiceData
from torch import Tensor, nn
from torch.autograd import Function


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread, and restore the number of threads afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Backward(Function):
    """Passes the result of a convolution on, and computes the gradients of its input and weight on the CPU."""

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor, result: Tensor, rules: IndiceData) -> Tensor:
        """Return `result` (V', out), the convolution of features (V, in) with weight (out, kx, ky, kz, in)."""
        ctx.save_for_backward(features, weight)
        ctx.rules = rules
        return result.view_as(result)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of the features and the weight."""
        features, weight = ctx.saved_tensors
        taps = weight.flatten(1, -2)  # (out, taps, in)
        to_features, to_taps = torch.zeros_like(features), torch.zeros_like(taps)
        for tap, (source, target) in _pairs(ctx.rules):
            arriving = gradient[target]
            to_taps[:, tap] = arriving.T @ features[source]
            to_features.index_add_(0, source, arriving @ taps[:, tap])
        return to_features, to_taps.view_as(weight), None, None


def _pairs(rules: IndiceData) -> Iterator[tuple[int, Tensor]]:
    """Kernel taps with the (2, K) rows of the input and of the output that each connects.

    A submanifold kernel is symmetric: spconv counts the pairs of its first half only, and lists none for its centre,
    which connects every row with itself.
    """
    counts = rules.indice_pair_num.tolist()
    taps = len(counts)
    for tap in range(taps):
        if rules.is_subm and tap == taps // 2:
            yield tap, torch.arange(len(rules.indices)).expand(2, -1)
            continue
        count = counts[taps - tap - 1] if rules.is_subm and tap > taps // 2 else counts[tap]
        yield tap, rules.indice_pairs[:, tap, :count].long()


class DeviceAlgorithm:
    """Chooses spconv's algorithm by the weight's device: gather-scatter on the CPU, implicit GEMM on CUDA.

    spconv 2.3's gather-scatter on the CPU (it has no other algorithm there) races with itself: with two threads its
    sums are off by percents. It gets one thread. Nor can it train there: the gradients are ours.
    """

    # mmdet3d patches spconv to permute every weight of a state dict without metadata, whatever its layout.
    # Here the layout is the business of `bevfusion.checkpoint`, which decides by shape.
    _load_from_state_dict = nn.Module._load_from_state_dict

    @property
    def algo(self) -> ConvAlgo:
        """Algorithm of the next forward."""
        weight = getattr(self, "weight", None)
        on_cpu = weight is None or weight.device.type == "cpu"
        return ConvAlgo.Native if on_cpu else ConvAlgo.MaskImplicitGemm

    @algo.setter
    def algo(self, _: ConvAlgo) -> None:
        """spconv's constructor assigns its own choice, made before the device is known."""

    def forward(self, input: SparseConvTensor, *args, **kwargs) -> SparseConvTensor:
        """Convolve features (V, in_channels)."""
        with one_thread() if self.weight.device.type == "cpu" else nullcontext():
            return super().forward(input, *args, **kwargs)

    def _conv_forward(
        self, training: bool, input: SparseConvTensor, weight: Tensor, *args, **kwargs
    ) -> SparseConvTensor:
        if weight.is_cuda or not torch.is_grad_enabled():
            return super()._conv_forward(training, input, weight, *args, **kwargs)
        with torch.no_grad():
            out = super()._conv_forward(training, input, weight, *args, **kwargs)
        rules = out.find_indice_pair(self.indice_key)
        return out.replace_feature(_Backward.apply(input.features, weight, out.features, rules))


class SubMConv3d(DeviceAlgorithm, SpconvSubMConv3d):
    """Submanifold sparse convolution; weight (out, kx, ky, kz, in)."""


class SparseConv3d(DeviceAlgorithm, SpconvSparseConv3d):
    """Strided sparse convolution; weight (out, kx, ky, kz, in)."""
