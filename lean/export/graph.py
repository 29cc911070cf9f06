"""A read-only view of an ONNX graph, and the clean-up of what torch's exporter writes."""

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# What sizes and constants are computed with; layers on constant inputs (the embedding of positions) stay layers.
FOLDED = {
    *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Mul", "Range"),
    *("Reshape", "ScatterND", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where", "Mod", "Not", "Or", "And"),
    *("Ceil", "Floor", "Neg", "Min", "Max", "Less", "Greater"),
}
LARGE = 1024  # values of a constant that is surely no size


class GraphView:
    """Who makes and who reads each tensor of a graph; describes the graph as it was when the view was made.

    Attributes:
        initialisers: constant tensors by name.
        producer: the node that makes a tensor, by the tensor's name.
        readers: the nodes that read a tensor.
    """

    def __init__(self, model: ModelProto):
        graph = model.graph
        self.initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in filter(None, node.input):
                self.readers.setdefault(name, []).append(node)

    def array(self, name: str) -> np.ndarray | None:
        """The value of a constant tensor, None if it is computed."""
        tensor = self.initialisers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def source(self, name: str) -> NodeProto | None:
        """The node that makes `name`, None for inputs and constants."""
        return self.producer.get(name)


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of an attribute, `default` if the node has none of that name."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def value_infos(model: ModelProto) -> Iterator[onnx.ValueInfoProto]:
    """Types of all tensors of a graph that has passed shape inference."""
    for group in (model.graph.input, model.graph.value_info, model.graph.output):
        yield from group


def infer_shapes(model: ModelProto) -> dict[str, tuple[int, list[int | None]]]:
    """Element type and shape (None where unknown) of the tensors by name; plugin nodes keep their input's shape."""
    known = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    known.graph.name = model.graph.name
    known.graph.input.extend(model.graph.input)
    known.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > LARGE:  # no size depends on its values, and copying them takes its time
            known.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            known.graph.initializer.append(tensor)
    for node in model.graph.node:
        copy = known.graph.node.add()
        copy.CopyFrom(node)
        if node.domain not in ("", "ai.onnx"):
            copy.domain, copy.op_type = "", "Identity"
            del copy.input[1:], copy.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(known, data_prop=True)
    found = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in model.graph.initializer}
    for info in value_infos(inferred):
        tensor = info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        if tensor.HasField("shape"):
            found[info.name] = (tensor.elem_type, shape)
    return found


def simplify(model: ModelProto) -> ModelProto:
    """Replace what is constant by its value, and drop nodes that do nothing; the result computes the same.

    Quantised weights stay as they are: TensorRT wants to see their Q/DQ pairs. Outputs get their inferred shapes.
    """
    _constants_to_initialisers(model)
    while _fold(model):
        pass
    _drop_identities(model)
    _drop_unread(model)
    _part_pairs(model)
    _transpose_quantised_weights(model)
    shapes = infer_shapes(model)
    for output in model.graph.output:
        elem_type, shape = shapes[output.name]
        output.type.CopyFrom(helper.make_tensor_type_proto(elem_type, shape))
    return model


def _replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _constants_to_initialisers(model: ModelProto) -> None:
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = ReferenceEvaluator(_single(node, model)).run(None, {})[0]
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), node.output[0]))
        else:
            kept.append(node)
    _replace_nodes(model, kept)


def _single(node: NodeProto, model: ModelProto) -> ModelProto:
    """A model of one node whose inputs are fed."""
    inputs = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(filter(None, node.input))]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    return helper.make_model(
        helper.make_graph([node], "single", inputs, outputs),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )


def _fold(model: ModelProto) -> bool:
    """Compute the nodes that compute sizes and constants; tell whether there were any."""
    view, shapes = GraphView(model), infer_shapes(model)
    kept, folded = [], {}
    for node in model.graph.node:
        inputs = {name: folded.get(name, view.array(name)) for name in node.input if name}
        if node.op_type == "Shape":
            shape = shapes.get(node.input[0], (None, [None]))[1]
            values = [None] if None in shape or node.attribute else [np.array(shape, np.int64)]
        elif node.op_type not in FOLDED or node.domain or any(value is None for value in inputs.values()):
            values = [None]
        else:
            values = ReferenceEvaluator(_single(node, model)).run(None, inputs)
        if values[0] is None:
            kept.append(node)
        else:
            folded |= dict(zip(node.output, map(np.asarray, values), strict=True))
    _replace_nodes(model, kept)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in folded.items())
    return bool(folded)


def _drop_identities(model: ModelProto) -> None:
    """Let the readers of an Identity read what it reads."""
    outputs = {output.name for output in model.graph.output}
    same: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            same[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _replace_nodes(model, kept)


def _part_pairs(model: ModelProto) -> None:
    """Give each reader of a quantised tensor a Q/DQ pair of its own, as the original files have it everywhere.

    The exporter merges equal pairs where it can prove that nothing writes into their input, so in some places only.
    """
    view = GraphView(model)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        quantize = view.source(node.input[0]) if node.op_type == "DequantizeLinear" else None
        for count, reader in enumerate(view.readers.get(node.output[0], [])[1:] if quantize else [], 1):
            pair = [NodeProto(), NodeProto()]
            for copy, original in zip(pair, (quantize, node), strict=True):
                copy.CopyFrom(original)
                copy.name, copy.output[0] = f"{original.name}_{count}", f"{original.output[0]}_{count}"
            pair[1].input[0] = pair[0].output[0]
            nodes.extend(pair)
            index = list(reader.input).index(node.output[0])
            reader.input[index] = pair[1].output[0]
    _replace_nodes(model, nodes)


def _transpose_quantised_weights(model: ModelProto) -> None:
    """Store the quantised weights of matrix products as they are multiplied: TensorRT wants nothing behind the pair."""
    view = GraphView(model)
    kept = []
    for node in model.graph.node:
        dequantize = view.source(node.input[0]) if node.op_type == "Transpose" else None
        quantize = view.source(dequantize.input[0]) if dequantize and dequantize.op_type == "DequantizeLinear" else None
        weight = view.array(quantize.input[0]) if quantize else None
        if weight is None or weight.ndim != 2 or len(view.readers[dequantize.output[0]]) > 1:
            kept.append(node)
            continue
        view.initialisers[quantize.input[0]].CopyFrom(numpy_helper.from_array(weight.T.copy(), quantize.input[0]))
        for half in (quantize, dequantize):
            axis = next((a for a in half.attribute if a.name == "axis"), None)
            if axis is not None:
                axis.i = 1 - axis.i
        dequantize.output[0] = node.output[0]
    _replace_nodes(model, kept)


def _drop_unread(model: ModelProto) -> None:
    """Drop initialisers that nothing reads, and the exporter's notes on tensors that are gone."""
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend(kept)
