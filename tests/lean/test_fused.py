"""The fused quantizer gives what the library's gives, and steps back where a gradient or another mode is wanted."""

import pytest
import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor

from lean import kernels
from lean.fused import FusedQuantizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DESCRIPTORS = {
    "plain": QuantDescriptor(amax=1.7),
    "narrow": QuantDescriptor(amax=1.7, narrow_range=True),
    "4 bits": QuantDescriptor(amax=1.7, num_bits=4),
    "per channel": QuantDescriptor(axis=1, amax=[[[[0.5]], [[1.0]], [[2.0]]]]),
    "dynamic": QuantDescriptor(),
    "scaled": QuantDescriptor(amax=1.7, scale_amax=0.5),
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DESCRIPTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_gives_what_the_library_gives(x, name, dtype, device):
    ours, theirs = (kind(DESCRIPTORS[name]).to(device) for kind in (FusedQuantizer, TensorQuantizer))
    x = x.to(device, dtype)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_the_gradient_is_the_librarys(x):
    gradients = []
    for kind in (FusedQuantizer, TensorQuantizer):
        leaf = x.clone().requires_grad_()
        kind(DESCRIPTORS["plain"])(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_one_kernel_does_it_unless_a_gradient_is_wanted(x, monkeypatch):
    calls, fake_quantize = [], kernels.fake_quantize
    monkeypatch.setattr(kernels, "fake_quantize", lambda *args: calls.append(args) or fake_quantize(*args))
    quantizer = FusedQuantizer(DESCRIPTORS["plain"])
    quantizer(x)
    assert len(calls) == 1
    quantizer(x.clone().requires_grad_())
    assert len(calls) == 1


def test_export_takes_the_librarys_operators(x, monkeypatch):
    monkeypatch.setattr(TensorQuantizer, "use_fb_fake_quant", True)
    names = {event.key for event in _profiled(FusedQuantizer(DESCRIPTORS["plain"]), x)}
    assert any("fake_quantize_per_tensor_affine" in name for name in names)


def _profiled(module, x):
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x)
    return profile.key_averages()
