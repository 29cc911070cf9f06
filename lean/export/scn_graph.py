"""A sparse network's ONNX file as plain data, for reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from lean.errors import QuantizationError


@dataclass(frozen=True)
class Node:
    """One layer.

    Attributes:
        inputs: names of tensors and, for a convolution, of its weight and bias.
        attributes: integers, floats, strings, or lists of them.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]

    def __getitem__(self, attribute: str) -> Any:
        if attribute not in self.attributes:
            raise QuantizationError(f"{self.op} node {self.name} has no attribute {attribute!r}")
        return self.attributes[attribute]


@dataclass(frozen=True)
class Graph:
    """Layers in the order of their execution, weights and biases by name, names of input and output."""

    nodes: tuple[Node, ...]
    weights: dict[str, np.ndarray]
    input: str
    output: str

    def readers(self, tensor: str) -> list[Node]:
        """Return the layers that read `tensor`."""
        return [node for node in self.nodes if tensor in node.inputs]


def load_graph(file: str | Path) -> Graph:
    """Read `file`.

    Raises:
        QuantizationError: it can't be read, is no ONNX file, or has more than one input or output.
    """
    try:
        graph = onnx.load(str(file)).graph
    except OSError as error:
        raise QuantizationError(f"{file}: {error.strerror}") from None
    except DecodeError:
        raise QuantizationError(f"{file} is no ONNX file") from None
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise QuantizationError(f"{file}: a sparse network has one input and one output")
    nodes = tuple(
        Node(
            node.name,
            node.op_type,
            tuple(node.input),
            node.output[0],
            {attribute.name: _plain(onnx.helper.get_attribute_value(attribute)) for attribute in node.attribute},
        )
        for node in graph.node
    )
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return Graph(nodes, weights, graph.input[0].name, graph.output[0].name)


def _plain(value: bytes | float | Sequence) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, int | float) else list(value)
