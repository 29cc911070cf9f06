"""Which convolutions and matrix products of a written graph would not run in INT8, and why.

The rules are those of TensorRT's explicit quantisation: a layer runs in INT8 where Q/DQ pairs stand on its input, with
one scale, and on its weight, with one scale per channel. `python -m lean.export.lint FILE ...` prints its findings.
"""

import sys
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from lean.export.graph import GraphView, attribute

# Scale axis of the weight. TensorRT runs a transposed convolution as the gradient of a convolution, whose output
# channels are its input channels: dimension 0 of both.
WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 0, "MatMul": 1, "Gemm": 1}


@dataclass(frozen=True)
class Finding:
    """What a convolution, matrix product or concatenation runs in.

    Attributes:
        node: name of the node.
        kind: its operator.
        why_float: why it would not run in INT8; None if it would.
    """

    node: str
    kind: str
    why_float: str | None

    def __str__(self) -> str:
        return f"{self.node} ({self.kind}): {self.why_float or 'INT8'}"


def lint(model: ModelProto) -> list[Finding]:
    """Judge every convolution and matrix product of a graph, and every concatenation of quantised tensors, in order."""
    view = GraphView(model)
    findings = []
    for node in model.graph.node:
        if node.op_type in WEIGHT_AXIS:
            findings.append(Finding(node.name, node.op_type, _why_float(node, view)))
        elif node.op_type == "Concat" and (why := _why_mixed(node, view)):
            findings.append(Finding(node.name, node.op_type, why))
    return findings


def summary(name: str, findings: list[Finding]) -> list[str]:
    """One line on how many layers run in INT8, and one for each that does not."""
    layers = [finding for finding in findings if finding.kind in WEIGHT_AXIS]
    int8 = sum(finding.why_float is None for finding in layers)
    return [f"{name}: {int8} of {len(layers)} in INT8", *(f"  {f}" for f in findings if f.why_float)]


def _why_float(node: NodeProto, view: GraphView) -> str | None:
    data, weight = (view.source(name) for name in node.input[:2])
    constant = node.input[1] in view.initialisers
    if data is None or data.op_type != "DequantizeLinear":
        return f"its input {node.input[0]} is not quantised"
    if weight is None or weight.op_type != "DequantizeLinear":
        return f"its {'weight' if constant else 'second input'} {node.input[1]} is not quantised"
    axis = 0 if attribute(node, "transB", 0) else WEIGHT_AXIS[node.op_type]
    return _why_unfit(data, view, None) or _why_unfit(weight, view, axis)


def _why_unfit(dequantize: NodeProto, view: GraphView, axis: int | None) -> str | None:
    """Say what is wrong with a Q/DQ pair, of an activation if `axis` is None."""
    scale = view.array(dequantize.input[1])
    what = "input" if axis is None else "weight"
    if scale is None:
        return f"the scale of its {what} is computed"
    quantize = view.source(dequantize.input[0])
    if axis is None and (quantize is None or quantize.op_type != "QuantizeLinear"):
        return "its input has a DequantizeLinear without a QuantizeLinear"
    if axis is None and scale.size > 1:
        return f"its input has {scale.size} scales, TensorRT takes one"
    if axis is not None and scale.size > 1 and attribute(dequantize, "axis", 1) != axis:
        return f"its weight has scales on axis {attribute(dequantize, 'axis', 1)}, TensorRT takes axis {axis}"
    zero = view.initialisers.get(dequantize.input[2]) if len(dequantize.input) > 2 else None
    if zero is None or zero.data_type != TensorProto.INT8:
        return f"its {what} is not signed INT8"
    if view.array(zero.name).any():
        return f"the zero point of its {what} is not 0"
    return None


def _why_mixed(node: NodeProto, view: GraphView) -> str | None:
    """Say how the inputs of a concatenation differ; None if they have one scale, or none is quantised."""
    sources = [view.source(name) for name in node.input]
    scales = [view.array(s.input[1]) if s is not None and s.op_type == "DequantizeLinear" else None for s in sources]
    if all(scale is None for scale in scales):
        return None
    if any(scale is None for scale in scales):
        return "not all of its inputs are quantised"
    return None if len({scale.tobytes() for scale in scales}) == 1 else "its inputs have different scales"


def main() -> None:
    """Print what the layers of the files named on the command line run in."""
    for file in sys.argv[1:]:
        print(*summary(file, lint(onnx.load(file))), sep="\n")


if __name__ == "__main__":
    main()
