"""Quantised models to export, and onnxruntime as the judge of the files."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from bevfusion.config import load_config
from bevfusion.models import build_model
from lean import quantize
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.switches import named_quantizers
from qat.arguments import DEFAULT_CONFIG
from tests.conftest import ROOT
from tests.golden_model import golden_batch, golden_model
from tests.lean.golden_names import our_quantizer
from tests.qat.ptq_samples import REDUCED


def prepare(model: nn.Module) -> nn.Module:
    """Insert quantizers by the default recipe, fold, and set the weights' amax."""
    quantize.initialize()
    insert_quantizers(model, default_recipe(model))
    fold_sparse(model)
    fold_dense(model)
    calibrate_weights(model)
    return model


def reduced_model() -> nn.Module:
    """A small float model with random weights, the same on every call, whose BEV maps don't fade away."""
    torch.manual_seed(0)
    model = build_model(load_config(ROOT / DEFAULT_CONFIG, list(REDUCED)).model).eval()
    for module in (*model.fuser.modules(), *model.decoder.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def reduced_batch(golden: Path) -> dict:
    """The real frame with its images cut to the small model's size."""
    batch = golden_batch(golden)
    return {**batch, "img": batch["img"][..., :64, :176].contiguous()}


def reduced_ptq(golden: Path) -> nn.Module:
    """The small model, calibrated on the real frame."""
    model = prepare(reduced_model())
    with torch.no_grad():
        quantize.calibrate_model(model, [reduced_batch(golden)], "cpu", lambda net, batch: net(**batch), method="max")
    quantize.disable_layers(model, default_recipe(model).disable)
    return model.eval()


def golden_ptq(golden: Path) -> nn.Module:
    """The full model with the reference's weights and the amax that the reference found for its activations."""
    model = prepare(golden_model(golden))
    ours = named_quantizers(model)
    for reference in json.loads((golden / "ptq_reference.json").read_text())["quantizers"]:
        quantizer = ours.get(our_quantizer(reference["name"]))
        if quantizer is not None and quantizer.axis is None:
            quantizer.set_amax(torch.tensor(reference["amax"]))
    quantize.disable_layers(model, default_recipe(model).disable)
    return model.eval()


def session(path: Path | bytes) -> onnxruntime.InferenceSession:
    """Run a file as it stands, without onnxruntime's own optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(path: Path | bytes, **inputs: Tensor | np.ndarray) -> dict[str, np.ndarray]:
    """Outputs by name; the inputs are cast to what the file wants."""
    runner = session(path)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    fed = {tensor.name: np.asarray(inputs[tensor.name]).astype(types[tensor.type]) for tensor in runner.get_inputs()}
    names = [tensor.name for tensor in runner.get_outputs()]
    return dict(zip(names, runner.run(names, fed), strict=True))


def distance(actual: np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Relative L2 distance."""
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected))
