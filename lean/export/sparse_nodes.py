"""ONNX nodes of the kinds that libspconv's parser knows. Their attributes are those of the original exporter."""

from collections.abc import Sequence

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn

from lean.errors import QuantizationError
from lean.export.sparse_plan import INT8, Step
from lean.fused import FusedQuantizer
from lean.layers import QuantAdd

OUTPUT_BOUND = 200_000  # voxels; what the runtime's users know
HALF = torch.finfo(torch.float16)
NUMBERS = ("ndim", "in_channels", "out_channels", "groups", "subm", "transposed", "inverse")
AXES = ("kernel_size", "stride", "padding", "dilation", "output_padding")


class NodeWriter:
    """Writes the steps of a plan as nodes; tensors and nodes are numbered in order.

    Args:
        inverse: write all axes in the order z, y, x.
        output_bound: most voxels that the runtime makes room for in any layer.
    """

    def __init__(self, inverse: bool, output_bound: int = OUTPUT_BOUND):
        self.inverse, self.output_bound = inverse, output_bound
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.last = "0"
        self.channels = 0

    def add(self, step: Step) -> None:
        """Append one step."""
        inputs = [str(number) for number in step.inputs]
        if isinstance(step.layer, nn.ReLU):
            self._node("Relu", "relu", inputs)
        elif isinstance(step.layer, QuantAdd):
            self._add(step, inputs)
        else:
            self._convolution(step, inputs)

    def flatten(self, grid: Sequence[int], bev: Sequence[int]) -> None:
        """Append what turns the last sparse tensor, over `grid` cells (x, y, z), into a BEV map of shape `bev`."""
        shape = self._axes(grid)
        order = "zyx" if self.inverse else "xyz"
        dense = [bev[0], self.channels, *shape]
        self._node("ScatterDense", "scatter", [self.last], input_spatial_shape=shape, format=order, output_shape=dense)
        self._node("Transpose", "transpose", [self.last], dims=[0, 1, 2, 4, 3] if self.inverse else [0, 1, 4, 2, 3])
        self._node("Reshape", "reshape", [self.last], dims=list(bev))

    def _axes(self, values: Sequence[int]) -> list[int]:
        return list(values)[::-1] if self.inverse else list(values)

    def _node(self, op: str, prefix: str, inputs: list[str], **attributes: object) -> None:
        number = sum(node.op_type == op for node in self.nodes)
        self.last = str(len(self.nodes) + 1)
        self.nodes.append(helper.make_node(op, inputs, [self.last], f"{prefix}{number}", **attributes))

    def _add(self, step: Step, inputs: list[str]) -> None:
        bound = _range(step.layer._input_quantizer, f"{step.name}._input_quantizer")
        ranges = {} if bound is None else {f"input{i}_dynamic_range": bound[0] for i in range(2)}
        if step.precision == INT8 and step.layer.inputs != "all":
            raise QuantizationError(f"{step.name}: libspconv adds two int8 tensors; quantise both inputs of the add")
        self._node("Add", "add", inputs, precision=step.precision, output_precision=step.output_precision, **ranges)

    def _convolution(self, step: Step, inputs: list[str]) -> None:
        conv = step.layer
        self.channels = conv.out_channels
        number = sum(node.op_type == "SparseConvolution" for node in self.nodes)
        weight = conv.weight.permute(0, 3, 2, 1, 4) if self.inverse else conv.weight
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
        for what, value in (("weight", weight), ("bias", bias)):
            half = half_precision(value, f"{step.name}.{what}").numpy()
            inputs.append(f"spconv{number}.{what}")
            data = half.astype("<f2").tobytes()
            self.initializers.append(helper.make_tensor(inputs[-1], TensorProto.FLOAT16, half.shape, data, raw=True))
        axes = {name: getattr(conv, name) for name in AXES}
        axes |= {"input_spatial_shape": step.before, "output_spatial_shape": step.after}
        self._node(
            "SparseConvolution",
            "conv",
            inputs,
            **{name: int(getattr(conv, name)) for name in NUMBERS},
            **{name: self._axes(values) for name, values in axes.items()},
            **_ranges(step),
            input_shape=[1, conv.in_channels],  # one voxel stands for any number
            output_shape=[1, conv.out_channels],
            output_bound=self.output_bound,
            rulebook=conv.indice_key or step.name,  # spconv sees to it that layers of one key have one geometry
            activation="ReLU" if step.relu else "None",
            precision=step.precision,
            output_precision=step.output_precision,
        )


def _ranges(step: Step) -> dict[str, float | list[float]]:
    """Attributes with the calibrated ranges, also of a disabled layer if it has them."""
    conv = step.layer
    bounds = _range(conv._input_quantizer, f"{step.name}._input_quantizer")
    weights = _range(conv._weight_quantizer, f"{step.name}._weight_quantizer")
    if bounds is None or weights is None:
        return {}
    if len(weights) not in (1, conv.out_channels):
        raise QuantizationError(f"{step.name}._weight_quantizer: {len(weights)} ranges, {conv.out_channels} channels")
    weights = weights * (conv.out_channels // len(weights))
    return {"input_dynamic_range": bounds[0], "weight_dynamic_ranges": weights}


def _range(quantizer: FusedQuantizer, name: str) -> list[float] | None:
    """The quantizer's amax, rounded to fp16 as the weights are; None if it has none, which only a disabled one may."""
    if quantizer.amax is None:
        return None
    bounds = half_precision(quantizer.amax.reshape(-1), name)
    if not (bounds > 0).all():
        raise QuantizationError(f"{name}: amax {quantizer.amax.min():g} is not positive in fp16")
    return bounds.tolist()


def half_precision(value: Tensor, name: str) -> Tensor:
    """Round to fp16 (contiguous, on the CPU).

    Raises:
        QuantizationError: a value is NaN or beyond the range of fp16; `name` says whose.
    """
    half = value.detach().cpu().half().contiguous()
    if not torch.isfinite(half).all():
        worst = value.detach().abs().max().item()
        raise QuantizationError(
            f"{name}: {'NaN' if np.isnan(worst) else f'{worst:g}'} can't be stored in fp16 (largest: {HALF.max:g})"
        )
    return half
