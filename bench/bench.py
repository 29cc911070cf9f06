"""Time calibration and fake quantisation against pytorch-quantization, both sides in one run, and print a table.

    python bench/bench.py            # on CUDA if there is one, else on the CPU
    python bench/bench.py --device cpu --size 4000000 --quantizers 20
    python bench/bench.py --only model loading --dataset-root data/nuscenes

Every figure is a median over alternating repetitions, so that a busy machine slows both sides.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor, fake_tensor_quant
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import loading, whole_model
from bench.timing import Row, kernel_medians, medians, rows
from lean import kernels
from lean.amax import choose_amax
from lean.fused import FusedQuantizer
from lean.histogram import SLOTS, Histogram
from lean.observer import install_observers
from qat.common import make_repeatable


def observing(device: str, size: int, repeats: int) -> list[Row]:
    """One activation: read it once, observe it with the library, observe it with ours."""
    generator = torch.Generator(device).manual_seed(0)
    gauss = torch.randn(size, device=device, generator=generator)
    found = []
    for name, x in {"relu": gauss.relu(), "gauss": gauss, "constant": torch.full_like(gauss, 0.7)}.items():
        stock = calib.HistogramCalibrator(8, None, False)
        state = torch.zeros(SLOTS, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int32, device=device)
        tasks = {
            "read once (max)": x.max,
            "stock": lambda x=x, stock=stock: stock.collect(x),
            "ours": lambda x=x, state=state: kernels.observe(x, *state),
        }
        found += rows(f"observe {size / 1e6:.3g} M, {name}", kernel_medians(tasks, device, repeats), "read once (max)")
    return found


def fake_quantising(device: str, size: int, repeats: int) -> list[Row]:
    """One activation and one weight: copy, the library's fake quantisation, ours."""
    x = torch.randn(size, device=device)
    weight = torch.randn(512, 512, 3, 3, device=device)
    cases = {
        f"fake-quantise {size / 1e6:.3g} M": (x, torch.tensor(3.0, device=device)),
        "fake-quantise weight 512x512x3x3": (weight, weight.abs().amax((1, 2, 3), keepdim=True)),
    }
    found = []
    for name, (values, amax) in cases.items():
        tasks = {
            "copy": values.clone,
            "stock": lambda values=values, amax=amax: fake_tensor_quant(values, amax, 8, False, False),
            "ours": lambda values=values, amax=amax: kernels.fake_quantize(values, amax),
        }
        found += rows(name, kernel_medians(tasks, device, repeats), "copy")
    return found


def choosing(device: str, count: int) -> list[Row]:
    """amax by MSE for all quantizers of a model; the library's is timed on two and multiplied."""
    rng = np.random.default_rng(0)
    data = [np.maximum(rng.standard_normal(100_000) ** 3, 0).astype(np.float32) * (i + 1) for i in range(count)]
    ours = {str(i): Histogram.from_values(values) for i, values in enumerate(data)}
    stock = [calib.HistogramCalibrator(8, None, False) for _ in range(2)]
    for calibrator, values in zip(stock, data, strict=False):
        calibrator.collect(torch.from_numpy(values).to(device))
    where = Tensor.cuda if device == "cuda" else lambda tensor: tensor  # the library asks for a GPU
    with mock.patch.object(Tensor, "cuda", where):
        tasks = {"stock, two": lambda: [c.compute_amax("mse") for c in stock]}
        per_quantizer = medians(tasks, device, 1)["stock, two"] / 2
    times = medians({method: lambda m=method: choose_amax(ours, m) for method in ("mse", "entropy")}, device, 3)
    what = f"amax of {count} quantizers"
    return [
        (what, "stock, mse", f"{per_quantizer * count:.0f}", "1"),
        *((what, f"ours, {m}", f"{t:.0f}", f"1/{per_quantizer * count / t:.0f}") for m, t in times.items()),
    ]


def quantised(model: nn.Module, kind: type[TensorQuantizer]) -> nn.Module:
    """Give every convolution quantizers of a kind, with plausible amax, and switch them off."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d:
                conv = quant_nn.QuantConv2d(
                    child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, bias=False
                )
                conv.weight = child.weight
                amax = child.weight.detach().abs().amax((1, 2, 3), keepdim=True)
                conv._input_quantizer = kind(QuantDescriptor(amax=2.0, calib_method="histogram"))
                conv._weight_quantizer = kind(QuantDescriptor(axis=0, amax=amax.cpu().numpy()))
                setattr(parent, name, conv)
    set_mode(model, quant=False, observe=False)
    return model


def set_mode(model: nn.Module, quant: bool, observe: bool) -> None:
    """Let all quantizers of a model quantise, and those of inputs observe, or not."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            module._if_quant, module._if_calib = quant, observe and name.endswith("_input_quantizer")


def forwards(device: str, repeats: int) -> list[Row]:
    """Six images through a ResNet: plain, observing and fake-quantised, with the library and with ours."""
    build, size = (
        (torchvision.models.resnet50, (256, 704)) if device == "cuda" else (torchvision.models.resnet18, (128, 352))
    )
    plain = build(weights=None).eval().to(device)
    images = torch.randn(6, 3, *size, device=device)
    stock, ours = (quantised(build(weights=None).eval(), kind).to(device) for kind in (TensorQuantizer, FusedQuantizer))
    install_observers({n: m for n, m in ours.named_modules() if n.endswith("_input_quantizer")})

    def forward(model: nn.Module, **mode: bool) -> None:
        set_mode(model, **mode)
        model(images)

    tasks = {
        "plain": lambda: plain(images),
        "observing, stock": lambda: forward(stock, quant=False, observe=True),
        "observing, ours": lambda: forward(ours, quant=False, observe=True),
        "fake-quantised, stock": lambda: forward(stock, quant=True, observe=False),
        "fake-quantised, ours": lambda: forward(ours, quant=True, observe=False),
    }
    with torch.no_grad():
        return rows(f"{build.__name__}, 6x3x{size[0]}x{size[1]}", medians(tasks, device, repeats), "plain")


PARTS = ("observe", "quantise", "amax", "resnet", "model", "loading")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to time")
    parser.add_argument("--size", type=int, default=17_300_000, help="values of the activation that is observed")
    parser.add_argument("--quantizers", type=int, default=105)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--config", help="model (default: the full ResNet-50 one on CUDA, the demo's on the CPU)")
    parser.add_argument("--points", type=int, nargs="+", help="points in the model's cloud (default: 30000, 250000)")
    parser.add_argument("--dataset-root", help="nuScenes, or a synthetic one: without it loading is not timed")
    parser.add_argument(
        "--workers", type=int, nargs="+", help="data loading processes (default: 1, and by the machine)"
    )
    parser.add_argument("--frames", type=int, default=96, help="frames to load, from few in turn")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    make_repeatable(0)  # as qat/ptq.py computes
    parts = {
        "observe": lambda: observing(args.device, args.size, args.repeats),
        "quantise": lambda: fake_quantising(args.device, args.size, args.repeats),
        "amax": lambda: choosing(args.device, args.quantizers),
        "resnet": lambda: forwards(args.device, args.repeats),
        "model": lambda: whole_model.forwards(args.device, args.repeats, args.config, args.points),
        "loading": lambda: loading.rates(args.device, args.config, args.dataset_root, args.workers, args.frames),
    }
    table = [("what", "how", "ms", "ratio")]
    for part in args.only:
        if part != "loading" or args.dataset_root:
            table += parts[part]()
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    for row in table:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}", flush=True)


if __name__ == "__main__":
    main()
