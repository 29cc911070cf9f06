"""spconv 2 convolutions that run wherever their weight lies and load what they are given."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from spconv.core import ConvAlgo
from spconv.pytorch import SparseConv3d as SpconvSparseConv3d
from spconv.pytorch import SparseConvTensor
from spconv.pytorch import SubMConv3d as SpconvSubMConv3d
from torch import nn


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread, and restore the number of threads afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DeviceAlgorithm:
    """Chooses spconv's algorithm by the weight's device: gather-scatter on the CPU, implicit GEMM on CUDA.

    spconv 2.3's gather-scatter on the CPU (it has no other algorithm there) races with itself: with two threads its
    sums are off by percents. It gets one thread.
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


class SubMConv3d(DeviceAlgorithm, SpconvSubMConv3d):
    """Submanifold sparse convolution; weight (out, kx, ky, kz, in)."""


class SparseConv3d(DeviceAlgorithm, SpconvSparseConv3d):
    """Strided sparse convolution; weight (out, kx, ky, kz, in)."""
