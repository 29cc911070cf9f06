"""Kernels: every device counts as the plain numpy form does, and fake-quantises as pytorch-quantization does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_quantization.tensor_quant import fake_tensor_quant

from lean import kernels
from lean.errors import QuantizationError
from lean.histogram import SLOTS, Histogram
from tests.lean.test_histogram import mixed_values

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROOT = Path(__file__).resolve().parents[2]


def empty_state(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(SLOTS, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int32, device=device)


def observed(*tensors: torch.Tensor) -> Histogram:
    state = empty_state(tensors[0].device)
    for tensor in tensors:
        kernels.observe(tensor, *state)
    return Histogram(*(part.cpu().numpy() for part in state))


def plain(tensor: torch.Tensor) -> Histogram:
    return Histogram.from_values(tensor.cpu().float().numpy())


def odd_values(size: int = 30_000) -> torch.Tensor:
    """Magnitudes of all of float32, both signs and zeros, infinities and NaN."""
    values = mixed_values(np.random.default_rng(0), size)
    values[::997], values[1::991], values[2::983] = np.nan, np.inf, -np.inf
    return torch.from_numpy(values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_observing_equals_the_numpy_form(dtype, device):
    values = odd_values().to(dtype)
    assert observed(values.to(device)) == plain(values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 15, 4095, 4096, 4097, 262_144, 700_001])
def test_any_size_is_counted_completely(size, device):
    values = torch.from_numpy(np.random.default_rng(size).standard_normal(size).astype(np.float32)).relu()
    assert observed(values.to(device)) == plain(values)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    values = odd_values(900_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert observed(values) == plain(values)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
def test_calls_add_up_and_the_order_is_of_no_account(device):
    values = odd_values().to(device)
    parts = values[torch.from_numpy(np.random.default_rng(1).permutation(len(values))).to(device)].split(7_001)
    assert observed(*parts) == plain(values)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_zero_constant_and_scalar_tensors(device):
    assert observed(torch.zeros(0, 64, device=device)) == Histogram.empty()
    for tensor in (torch.zeros(3, 50_000), torch.full((100_000,), 2.5), torch.tensor(-3.0)):
        assert observed(tensor.to(device)) == plain(tensor)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_are_of_no_account(device):
    values = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 6, 10, 12)).astype(np.float32))
    moved = values.to(device)
    views = {
        "channels last": moved.to(memory_format=torch.channels_last),
        "transposed": moved.transpose(1, 3),
        "expanded": moved[:1].expand(4, -1, -1, -1),
        "sliced": moved[:, ::2, 1:, ::3],
        "unaligned": moved.view(-1)[1:],
        "channels last 3d": moved.view(2, 3, 2, 10, 12).to(memory_format=torch.channels_last_3d),
    }
    for name, view in views.items():
        assert observed(view) == plain(view), name


def test_a_tensor_is_left_as_it_was():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = values.detach().clone()
    observed(values)
    assert torch.equal(values.detach(), before)


def test_what_cannot_be_observed_is_refused():
    with pytest.raises(QuantizationError, match=r"torch\.int64 tensor"):
        observed(torch.arange(3))
    with pytest.raises(QuantizationError, match=r"tensor on meta: the counts are on cpu"):
        kernels.observe(torch.zeros(3, device="meta"), *empty_state())


@pytest.mark.gpu
def test_more_than_two_to_the_31_values_on_the_gpu():
    values = torch.full((1 << 16, (1 << 15) + 1), 0.3, dtype=torch.float16, device="cuda")
    values[-1, -1] = -8
    histogram, expected = observed(values), plain(values[-1])
    assert values.numel() > 1 << 31
    assert np.array_equal(np.flatnonzero(histogram.counts), np.flatnonzero(expected.counts))
    assert (histogram.total, histogram.minimum, histogram.counts.max()) == (values.numel(), -8, values.numel() - 1)


@pytest.mark.gpu
def test_observing_does_not_synchronise_with_the_host():
    values, state = torch.randn(100_000, device="cuda"), empty_state("cuda")
    amax = torch.tensor(2.0, device="cuda")
    kernels.observe(values, *state)
    kernels.fake_quantize(values, amax)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.observe(values, *state)
        kernels.fake_quantize(values, amax)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def equal_or_both_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0, 7, -7), b.nan_to_num(0, 7, -7))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", range(8))
def test_fake_quantisation_equals_the_reference_data(golden, case, device):
    units = np.load(golden / "quantizer_units.npz")
    amax = [1.5, 3.0, 127.0, 0.1234567, 0.001, 5.9e-08, 6e-08, 0.0][case]
    out = kernels.fake_quantize(torch.from_numpy(units["fq/x"]).to(device), torch.tensor(amax, device=device))
    assert np.array_equal(out.cpu().numpy(), units[f"fq/{case}/out"])


@pytest.mark.parametrize("device", DEVICES)
def test_ties_and_bounds_equal_the_reference_data(golden, device):
    units = np.load(golden / "quantizer_units.npz")
    x = torch.from_numpy(units["fq_ties/x"]).to(device)
    for name, amax, options in (
        ("out_amax127", 127.0, {}),
        ("out_amax127_narrow", 127.0, {"narrow_range": True}),
        ("out_amax60", 60.0, {}),
    ):
        out = kernels.fake_quantize(x, torch.tensor(amax, device=device), **options)
        assert np.array_equal(out.cpu().numpy(), units[f"fq_ties/{name}"]), name


@pytest.mark.parametrize("device", DEVICES)
def test_channels_equal_the_reference_data(golden, device):
    units = np.load(golden / "quantizer_units.npz")
    for weight, case in (("pc/w", "pc/axis0"), ("pc/w", "pc/axis1"), ("pc5/w", "pc5")):
        inputs = (torch.from_numpy(units[key]).to(device) for key in (weight, f"{case}/amax"))
        assert np.array_equal(kernels.fake_quantize(*inputs).cpu().numpy(), units[f"{case}/out"]), case


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("amax", [3.0, 1e-3, 2.0**-24, 0.0, 1e30, float("nan")])
@pytest.mark.parametrize("options", [(8, False, False), (8, False, True), (4, False, False), (8, True, False)])
def test_fake_quantisation_equals_the_library(dtype, amax, options, device):
    x = odd_values().to(device, dtype)
    x = x.nan_to_num(1).abs() if options[1] else x
    amax = torch.tensor(amax, device=device)
    assert equal_or_both_nan(kernels.fake_quantize(x, amax, *options), fake_tensor_quant(x, amax, *options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "axis"), [((64, 48, 3, 3), 0), ((64, 48, 3, 3), 1), ((3, 3, 3, 16, 700), 4)])
def test_large_weights_per_channel_equal_the_library(shape, axis, device):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    amax = 0.7 * weight.abs().amax([i for i in range(len(shape)) if i != axis], keepdim=True)
    assert torch.equal(kernels.fake_quantize(weight, amax), fake_tensor_quant(weight, amax, 8, False, False))


@pytest.mark.parametrize("device", DEVICES)
def test_large_activations_of_any_layout_equal_the_library(device):
    x = torch.randn(2, 64, 101, 103, generator=torch.Generator().manual_seed(0)).to(device)
    amax = torch.tensor(2.1, device=device)
    for view in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 3), x[:, 1:, ::2]):
        out = kernels.fake_quantize(view, amax)
        assert torch.equal(out, fake_tensor_quant(view, amax, 8, False, False))
    assert kernels.fake_quantize(x.to(memory_format=torch.channels_last), amax).is_contiguous(
        memory_format=torch.channels_last
    )
    assert kernels.fake_quantize(x[:0], amax).shape == x[:0].shape


def test_what_cannot_be_fake_quantised_is_refused():
    x, amax = torch.randn(4, 3), torch.tensor(1.0)
    assert kernels.can_fake_quantize(x, amax)
    assert not kernels.can_fake_quantize(x.requires_grad_(), amax)
    x = x.detach()
    with pytest.raises(QuantizationError, match="float64"):
        kernels.fake_quantize(x.double(), amax)
    with pytest.raises(QuantizationError, match="one float32 amax or one per channel"):
        kernels.fake_quantize(x, torch.ones(4, 3))
    with pytest.raises(QuantizationError, match=r"amax \(1, 5\) doesn't fit"):
        kernels.fake_quantize(x, torch.ones(1, 5))
    with pytest.raises(QuantizationError, match="negative values in an unsigned quantizer"):
        kernels.fake_quantize(-x.abs(), amax, unsigned=True)
    with pytest.raises(QuantizationError, match="an amax is negative"):
        kernels.fake_quantize(x, -amax)


@pytest.mark.parametrize("script", ["triton_interpreted.py", "triton_compiled.py"])
def test_triton_kernels_without_a_gpu(script):
    """The interpreter runs the kernels' arithmetic; the compiler makes machine code of what it can't interpret."""
    pytest.importorskip("triton")
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": "1"} if "interpreted" in script else {})
    )
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
