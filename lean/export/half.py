"""From a float32 graph to one that states FP16 as its type, as strongly typed TensorRT networks need it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lean.errors import QuantizationError
from lean.export.graph import GraphView, attribute, infer_shapes

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
LARGEST = 65504.0
SMALLEST_SCALE = 2.0**-18  # below it FP16 rounds a scale by more than 1 %
LONG_SOFTMAX = 2**14  # with as many terms a mean probability is below the smallest normal FP16 number
CHOOSING = "FP16 scores near 1 would tie, which changes what TopK chooses"
SMALL_PROBABILITIES = "its probabilities lie below FP16's smallest normal number"
# They only move, compare or scale values: they stay in the type that a float32 input brings.
FOLLOWERS = {
    *("MaxPool", "Pad", "Equal", "Where", "Reshape", "Flatten", "Gather", "GatherElements", "Transpose", "Slice"),
    *("Concat", "Squeeze", "Unsqueeze", "Expand", "Split", "Mul", "TopK"),
}
FLOAT32_INPUTS = {"Resize": (1, 2)}  # region and scales have a type of their own


@dataclass
class HalfReport:
    """Where a graph in FP16 departs from it.

    Attributes:
        float32: names of the nodes that compute in float32, with the reason.
        raised: scales too small for FP16, which were raised to 2^-18: how many of each tensor.
    """

    float32: dict[str, str] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line for each reason to compute in float32, with the nodes, and for each tensor whose scales changed."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.float32.items():
            reasons.setdefault(why, []).append(name)
        kept = [f"float32 in {', '.join(names)}: {why}" for why, names in reasons.items()]
        return kept + [f"{count} scales of {name} raised to 2^-18" for name, count in self.raised.items()]


def check_half_range(model: ModelProto, file: str) -> None:
    """Refuse a graph with constants, or quantised ranges, that are not finite or beyond FP16's largest number.

    Raises:
        QuantizationError: names the file and the tensor.
    """
    view = GraphView(model)
    for name in view.initialisers:
        values = view.array(name)
        if values.dtype.kind == "f" and values.size:
            _refuse(np.abs(values.astype(np.float64)).max(), f"{file}: {name}")
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            _refuse(127 * float(view.array(node.input[1]).max()), f"{file}: the range of {node.input[0]}")


def _refuse(largest: float, what: str) -> None:
    if not math.isfinite(largest):
        raise QuantizationError(f"{what} holds NaN or infinity; check the checkpoint")
    if largest > LARGEST:
        raise QuantizationError(f"{what} reaches {largest:.4g}, beyond FP16's largest number {LARGEST:g}")


def to_half(model: ModelProto) -> tuple[ModelProto, HalfReport]:
    """Give every float32 tensor of a simplified graph the type FP16, inputs and outputs included.

    Quantised weights keep their INT8 values; scales are rounded to FP16. What would overflow or lose stays float32
    between casts. Needs opset 19, the first whose Q/DQ have FP16 scales.
    """
    shapes = infer_shapes(model)
    view, report = GraphView(model), HalfReport()
    _keep_float32(model, view, shapes, report)
    weights = _half_weights(view, report)
    types = {name: elem_type for name, (elem_type, _) in shapes.items()}
    caster = _Caster(model, view, types, report.float32, weights)
    caster.run()
    onnx.checker.check_model(model)
    return model, report


def _keep_float32(model: ModelProto, view: GraphView, shapes: Mapping, report: HalfReport) -> None:
    """Enter into `report` the nodes that must compute in float32, and those that only pass such values on."""
    for node in model.graph.node:
        reads = [view.source(name) for name in node.input if name]
        kept = [source.name for source in reads if source is not None and source.name in report.float32]
        if node.op_type == "Sigmoid":
            report.float32[node.name] = CHOOSING
        elif node.op_type == "Softmax" and _terms(node, shapes) >= LONG_SOFTMAX:
            report.float32[node.name] = SMALL_PROBABILITIES
        elif kept and (node.op_type in FOLLOWERS or (node.op_type == "MatMul" and _is_probability(reads[0]))):
            report.float32[node.name] = report.float32[kept[0]]


def _is_probability(source: NodeProto | None) -> bool:
    return source is not None and source.op_type == "Softmax"


def _terms(node: NodeProto, shapes: Mapping) -> int:
    return shapes[node.input[0]][1][attribute(node, "axis", -1)] or 0


def _half_weights(view: GraphView, report: HalfReport) -> dict[str, np.ndarray]:
    """FP16 form of all float32 constants, quantised weights placed on the grid of their FP16 scales."""
    half = {}
    for node in view.producer.values():
        if node.op_type != "QuantizeLinear":
            continue
        scale = view.array(node.input[1])
        half[node.input[1]] = np.maximum(scale, SMALLEST_SCALE).astype(np.float16)
        if raised := int((scale < SMALLEST_SCALE).sum()):
            report.raised[node.input[0]] = raised
        weight = view.array(node.input[0])
        if weight is not None:
            axis = attribute(node, "axis", 1)
            old, new = (_along(s.astype(np.float32), axis, weight.ndim) for s in (scale, half[node.input[1]]))
            old = np.where(old < SMALLEST_SCALE, new, old)
            half[node.input[0]] = (np.clip(np.rint(weight / old), -128, 127) * new).astype(np.float16)
    for name, tensor in view.initialisers.items():
        if tensor.data_type == FLOAT and name not in half:
            half[name] = view.array(name).astype(np.float16)
    return half


def _along(scale: np.ndarray, axis: int, dims: int) -> np.ndarray:
    return scale if scale.ndim == 0 else scale.reshape([-1 if i == axis else 1 for i in range(dims)])


class _Caster:
    """Rewrites a graph node by node, with a Cast wherever a reader wants another type than a tensor has."""

    def __init__(
        self, model: ModelProto, view: GraphView, types: dict[str, int], float32: Mapping[str, str], half: Mapping
    ):
        self.model, self.view, self.types, self.float32, self.half = model, view, types, float32, half
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.casts: dict[tuple[str, int], str] = {}
        self.now = {tensor.name: HALF for tensor in model.graph.input if types[tensor.name] == FLOAT}

    def run(self) -> None:
        """Rewrite all nodes and the types of inputs and outputs."""
        graph = self.model.graph
        outputs = {output.name for output in graph.output if self.types[output.name] == FLOAT}
        for node in list(graph.node):
            self.convert(node, outputs)
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.constants.values())
        for tensor in (*graph.input, *graph.output):
            if tensor.type.tensor_type.elem_type == FLOAT:
                tensor.type.tensor_type.elem_type = HALF

    def convert(self, node: NodeProto, outputs: set[str]) -> None:
        """Add `node` with the inputs that it wants."""
        wanted = FLOAT if node.name in self.float32 else HALF
        for index, name in enumerate(node.input):
            apart = index in FLOAT32_INPUTS.get(node.op_type, ())
            node.input[index] = self.read(name, FLOAT if apart else wanted) if name else name
        for attr in node.attribute:
            if attr.name == "to" and node.op_type == "Cast" and attr.i == FLOAT:
                attr.i = wanted
        self.nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in self.types:
                raise QuantizationError(
                    f"the type of {name} can't be inferred, so not written as FP16; use weak typing"
                )
            if self.types[name] != FLOAT:
                continue
            self.now[name] = wanted
            if name in outputs and wanted == FLOAT:
                node.output[index] = f"{name}_float32"
                self.nodes.append(
                    helper.make_node("Cast", node.output[index : index + 1], [name], f"{name}_cast", to=HALF)
                )

    def read(self, name: str, wanted: int) -> str:
        """The name under which tensor `name` has the type `wanted`, if it is a float tensor at all."""
        if name in self.view.initialisers:
            return self._constant(name, wanted)
        if name not in self.now or self.now[name] == wanted:
            return name
        key = (name, wanted)
        if key not in self.casts:
            self.casts[key] = f"{name}_{'float32' if wanted == FLOAT else 'float16'}"
            self.nodes.append(helper.make_node("Cast", [name], [self.casts[key]], f"{self.casts[key]}_cast", to=wanted))
        return self.casts[key]

    def _constant(self, name: str, wanted: int) -> str:
        tensor = self.view.initialisers[name]
        if tensor.data_type == FLOAT and wanted == HALF:
            self.constants[name] = numpy_helper.from_array(self.half[name], name)
            return name
        alias = f"{name}_float32" if tensor.data_type == FLOAT else name
        self.constants[alias] = numpy_helper.from_array(self.view.array(name), alias)
        return alias
