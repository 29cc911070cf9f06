"""Runs the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1); exits non-zero if a result is wrong."""

import numpy as np
import torch
from pytorch_quantization.tensor_quant import fake_tensor_quant

from lean.histogram import SLOTS, Histogram
from lean.kernels import cuda


def observed(values: torch.Tensor) -> Histogram:
    """Count with three programs, by global atomics: the interpreter has no shared memory."""
    counts, extremes = torch.zeros(SLOTS, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    cuda._observe[(3,)](values, counts, extremes, values.numel(), SHARED=False, TILE=512, THREADS=128, num_warps=4)
    return Histogram(counts.numpy(), extremes.numpy())


def fake_quantized(x: torch.Tensor, amax: torch.Tensor, inner: int, low: int, high: int) -> torch.Tensor:
    out = torch.empty_like(x)
    cuda.fake_quantize(x.view(-1), amax.view(-1), out.view(-1), inner, low, high)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0, 7, -7), b.nan_to_num(0, 7, -7))


def check_observing(values: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        cast = values.to(dtype)
        if dtype == torch.bfloat16:  # the interpreter, unlike a GPU, flushes these to zero
            cast[cast.abs() < torch.finfo(dtype).tiny] = 0
        assert observed(cast) == Histogram.from_values(cast.float().numpy()), dtype


def check_fake_quantising(values: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.float16):
        x = values.to(dtype)
        for amax in (3.0, 1e-3, 5e-8, 0.0, float("nan")):
            for low, narrow in ((-128, False), (-127, True)):
                bound = torch.tensor(amax)
                out = fake_quantized(x, bound, x.numel(), low, 127)
                assert same(out, fake_tensor_quant(x, bound, 8, False, narrow)), (dtype, amax, low)
    for axis in range(3):
        weight = values.nan_to_num(0, 1, -1)[:480].reshape(6, 8, 10).contiguous()
        bound = weight.abs().amax([i for i in range(3) if i != axis], keepdim=True) * 0.8
        out = fake_quantized(weight, bound, weight[(0,) * (axis + 1)].numel(), -128, 127)
        assert torch.equal(out, fake_tensor_quant(weight, bound, 8, False, False)), axis


def main() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(3000) * 10.0 ** rng.uniform(-44, 37, 3000)).astype(np.float32)
    values[:300], values[300], values[301:304] = 0, -0.0, [np.nan, np.inf, -np.inf]
    values[304:2000] = rng.standard_normal(1696)
    check_observing(torch.from_numpy(values))
    check_fake_quantising(torch.from_numpy(values))


if __name__ == "__main__":
    main()
