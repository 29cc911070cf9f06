"""Export of the LiDAR backbone as the ONNX file that libspconv's parser reads."""

import copy
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from spconv.pytorch import SparseConvTensor
from torch import Tensor, nn

from lean.bevfusion_recipe import LIDAR_BRANCH
from lean.errors import QuantizationError
from lean.export.checks import check_exportable
from lean.export.sparse_nodes import OUTPUT_BOUND, NodeWriter
from lean.export.sparse_plan import plan
from lean.export.sparse_trace import Tracer
from lean.files import atomic_write
from lean.fold import fold_sparse
from lean.insert import insert_branch
from lean.layers import QuantSparseConvolution
from lean.switches import disable_quantization, quantized_layers

IR_VERSION, OPSET = 8, ("ai.onnx", 11)  # those of the files that the runtime was written for


def export_lidar(
    backbone: nn.Module,
    file: str | Path,
    *,
    voxels: tuple[Tensor, Tensor],
    fp16: bool,
    inverse: bool = False,
    output_bound: int = OUTPUT_BOUND,
) -> None:
    """Write the LiDAR backbone to `file`; `backbone` stays as it is.

    Args:
        backbone: called with (features, coordinates, batch size), it returns a BEV map (1, C * Z, X, Y). With `fp16` it
            may be a float one, batch normalisations included.
        voxels: features (V, C) and coordinates (V, 4) int32 of (batch, x, y, z) to run it on; one voxel is enough.
        fp16: let all layers compute in fp16; otherwise enabled quantised layers compute in int8.
        inverse: write the form that reads voxels at (batch, z, y, x).
        output_bound: most voxels that the runtime makes room for in any layer.

    Raises:
        QuantizationError: `backbone` is not quantised or not calibrated, holds a layer the runtime doesn't have or a
            value beyond the range of fp16, or the file can't be written.
    """
    model = onnx_model(backbone, voxels=voxels, fp16=fp16, inverse=inverse, output_bound=output_bound)
    with atomic_write(Path(file)) as out:
        out.write(model.SerializeToString(deterministic=True))


def onnx_model(
    backbone: nn.Module,
    *,
    voxels: tuple[Tensor, Tensor],
    fp16: bool,
    inverse: bool = False,
    output_bound: int = OUTPUT_BOUND,
) -> onnx.ModelProto:
    """Build what `export_lidar` writes."""
    backbone = _prepare(backbone, fp16)
    features, coordinates = voxels[0].detach().cpu().float(), voxels[1].cpu().int()
    # A tensor of its own: an in-place layer must not reach the caller's.
    with torch.no_grad(), disable_quantization(backbone), Tracer(backbone, features.clone()) as tracer:
        bev = backbone(tracer.tensors[0], coordinates, 1)
    writer = NodeWriter(inverse, output_bound)
    for step in plan(tracer.calls, fp16):
        writer.add(step)
    _check_flattening(tracer, bev)
    writer.flatten(tuple(tracer.sparse.spatial_shape), tuple(bev.shape))
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)]
        for name, shape in (("0", [1, features.shape[1]]), (writer.last, list(bev.shape)))
    )
    graph = helper.make_graph(writer.nodes, "scn", inputs, outputs, writer.initializers)
    opsets = [helper.make_operatorsetid(*OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lean")


def _prepare(backbone: nn.Module, fp16: bool) -> nn.Module:
    """Copy the backbone to the CPU, folded, with all its layers of the kinds that the tracer knows."""
    check_exportable(backbone, fp16)
    backbone = copy.deepcopy(backbone).cpu().float().eval()
    if not quantized_layers(backbone):
        insert_branch(backbone, LIDAR_BRANCH)
        disable_quantization(backbone).apply()
    fold_sparse(backbone)
    norms = [n for n, m in backbone.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        raise QuantizationError(f"LiDAR backbone: {norms[0]} follows no convolution that it could be folded into")
    return backbone


def _check_flattening(tracer: Tracer, bev: Tensor) -> None:
    """Make sure that the backbone flattens its last tensor as the runtime does."""
    if tracer.sparse is None or not isinstance(tracer.calls[-1].layer, QuantSparseConvolution | nn.ReLU):
        raise QuantizationError("the LiDAR backbone must end with a sparse convolution (and its ReLU)")
    last = tracer.sparse
    dense = SparseConvTensor(tracer.tensors[-1], last.indices, last.spatial_shape, last.batch_size).dense()
    if bev.dim() != 4 or not torch.equal(dense.permute(0, 1, 4, 2, 3).flatten(1, 2), bev):
        raise QuantizationError(
            "the LiDAR backbone must flatten (1, C, X, Y, Z) to (1, C * Z, X, Y), as the runtime does"
        )
