"""What has to work for the scripts to run, each tried on the smallest example; see doctor.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat.arguments import DEFAULT_CONFIG

ROOT = Path(__file__).resolve().parents[1]
BOTH = ("cpu", "cuda")


def torch_convolution(device: str) -> None:
    """Convolve an image of ones."""
    import torch

    image = torch.ones(1, 1, 4, 4, device=device)
    result = torch.nn.functional.conv2d(image, torch.ones(1, 1, 3, 3, device=device))
    _expect(result.flatten().tolist(), [9.0] * 4)


def sparse_convolution(device: str) -> None:
    """Convolve a full 3x3x3 grid sparsely, which has to give what a dense convolution gives."""
    import torch
    from spconv.core import ConvAlgo
    from spconv.pytorch import SparseConvTensor, SubMConv3d

    cells = torch.nonzero(torch.ones(1, 3, 3, 3)).int().contiguous().to(device)  # spconv ignores strides
    features = torch.arange(27.0 * 4, device=device).reshape(27, 4) / 108
    algo = ConvAlgo.Native if device == "cpu" else None
    layer = SubMConv3d(4, 8, 3, padding=1, bias=False, algo=algo).to(device)
    with torch.no_grad():
        grid = SparseConvTensor(features, cells, [3, 3, 3], 1)
        weight = layer.weight.permute(0, 4, 1, 2, 3)
        difference = layer(grid).dense() - torch.nn.functional.conv3d(grid.dense(), weight, padding=1)
    if difference.abs().max() > 1e-2:  # leaves room for TF32
        raise ArithmeticError(f"differs from a dense convolution by {difference.abs().max():.2g}")


def voxelisation(device: str) -> None:
    """Sort three points into two voxels."""
    import torch
    from mmcv.ops import Voxelization

    layer = Voxelization([1, 1, 1], [0, 0, 0, 4, 4, 4], max_num_points=5, max_voxels=10)
    points = torch.tensor([[0.5, 0.5, 0.5], [3.5, 3.5, 3.5], [0.6, 0.5, 0.5]], device=device)
    _expect(sorted(layer(points)[2].tolist()), [1, 2])


def fake_quantisation(device: str) -> None:
    """Quantise with step 1: round, and clip at 127."""
    import torch
    from pytorch_quantization.nn import TensorQuantizer
    from pytorch_quantization.tensor_quant import QuantDescriptor

    quantizer = TensorQuantizer(QuantDescriptor(num_bits=8, amax=127.0)).to(device)
    _expect(quantizer(torch.tensor([0.4, 0.6, 300.0], device=device)).tolist(), [0.0, 1.0, 127.0])


def model_library(device: str) -> None:
    """Import mmdet3d with the registries that the model's modules are found in."""
    import bevfusion.registry  # noqa: F401


def default_config(device: str) -> None:
    """Read the default config by torchpack's rules."""
    from bevfusion.config import load_config

    _expect(load_config(ROOT / DEFAULT_CONFIG).model.type, "BEVFusion")


def nuscenes_devkit(device: str) -> None:
    """Import the tables and the official evaluation."""
    import nuscenes.eval.detection.evaluate
    import nuscenes.nuscenes  # noqa: F401


def onnx_runtime(device: str) -> None:
    """Run a graph of one node."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import helper

    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    _expect(session.run(None, {"x": np.float32([1, 2])})[0].tolist(), [2.0, 4.0])


def _expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise ArithmeticError(f"gave {got} instead of {wanted}")


@dataclass(frozen=True)
class Probe:
    """One thing that has to work: its name, what tries it, and the stage of `make setup` that it comes with."""

    name: str
    attempt: Callable[[str], None]
    stage: str
    devices: Sequence[str] = ("cpu",)
    main_job: bool = True


PROBES = (
    Probe("torch: 2-D convolution", torch_convolution, "torch", BOTH),
    Probe("spconv: submanifold 3-D convolution", sparse_convolution, "spconv", BOTH),
    Probe("mmcv operators: voxelisation", voxelisation, "mmcv", BOTH),
    Probe("pytorch-quantization: fake quantisation", fake_quantisation, "no-deps", BOTH),
    Probe("mmdet3d: import", model_library, "no-deps"),
    Probe("torchpack: default config", default_config, "no-deps"),
    Probe("nuScenes devkit: import", nuscenes_devkit, "no-deps"),
    Probe("onnxruntime: one-node graph", onnx_runtime, "base", main_job=False),
)
