"""Executes the LiDAR branch's ONNX file without a GPU, as a proof of what was exported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lean.errors import QuantizationError
from lean.export.scn_arithmetic import FloatArithmetic, IntegerArithmetic, Tensor
from lean.export.scn_graph import Node, load_graph
from lean.export.scn_rulebook import Rulebook, build_rulebook

GEOMETRY = ("kernel_size", "stride", "padding", "dilation")


class SparseInterpreter:
    """Runs a file that `lean.export.sparse` or the original exporter wrote.

    Args:
        file: ONNX file.
    """

    def __init__(self, file: str | Path):
        self.graph = load_graph(file)
        unknown = [node for node in self.graph.nodes if node.op not in HANDLERS]
        if unknown:
            raise QuantizationError(
                f"{file}: node {unknown[0].name} is a {unknown[0].op}, which the runtime doesn't have"
            )

    def run(self, features: np.ndarray, coordinates: np.ndarray, *, integer: bool) -> np.ndarray:
        """Encode voxels into a BEV map.

        Args:
            features: (V, C) floating.
            coordinates: (V, 4) integer, (batch, x, y, z), or (batch, z, y, x) for a file of that order; batch is 0.
            integer: compute in the precision that each layer states, int8 layers in integers; otherwise all in float32.

        Returns:
            (1, C * Z, X, Y); float16 if `integer`, else float32.

        Raises:
            QuantizationError: the voxels don't fit the file, or a value is beyond the range of fp16.
        """
        return self.run_all(features, coordinates, integer=integer)[self.graph.output]

    def run_all(self, features: np.ndarray, coordinates: np.ndarray, *, integer: bool) -> dict:
        """Run like `run`, and return every tensor by name; sparse ones as `Tensor`."""
        coordinates = np.asarray(coordinates).astype(np.int64)
        if coordinates.ndim != 2 or coordinates.shape[1] != 4 or len(coordinates) != len(features):
            raise QuantizationError(f"features {features.shape} and coordinates {coordinates.shape} don't fit together")
        if (coordinates[:, 0] != 0).any():
            raise QuantizationError("the file is for one frame: the batch index must be 0")
        run = _Run(IntegerArithmetic(self.graph) if integer else FloatArithmetic(), self.graph.weights)
        values = {self.graph.input: run.arithmetic.store(coordinates, np.asarray(features))}
        for node in self.graph.nodes:
            inputs = [values[name] for name in node.inputs if name in values]
            values[node.output] = HANDLERS[node.op](run, node, *inputs)
        return values


class _Run:
    """What the layers of one run share: arithmetic, weights, and rulebooks by name."""

    def __init__(self, arithmetic: FloatArithmetic, weights: dict[str, np.ndarray]):
        self.arithmetic, self.weights = arithmetic, weights
        self.rulebooks: dict[str, Rulebook] = {}

    def rulebook(self, node: Node, x: Tensor) -> Rulebook:
        """Return the rulebook that the node names: built by the first node that names it, as in the runtime."""
        name = node["rulebook"]
        if name not in self.rulebooks:
            grids = node["input_spatial_shape"], node["output_spatial_shape"]
            geometry = [node[attribute] for attribute in GEOMETRY]
            self.rulebooks[name] = build_rulebook(x.coordinates, *grids, *geometry, bool(node["subm"]))
        found = self.rulebooks[name]
        if found.voxels != len(x.coordinates):
            raise QuantizationError(f"{node.name}: rulebook {name!r} was built for other voxels")
        return found


def _convolution(run: _Run, node: Node, x: Tensor) -> Tensor:
    weight, bias = (run.weights[name] for name in node.inputs[1:])
    if weight.shape != (node["out_channels"], *node["kernel_size"], node["in_channels"]):
        raise QuantizationError(f"{node.name}: weight {weight.shape} doesn't fit its kernel and channels")
    rules = run.rulebook(node, x)
    total = run.arithmetic.convolve(node, x, weight, rules)
    total = total + bias.astype(total.dtype)
    if node["activation"] == "ReLU":
        total = np.maximum(total, 0)
    return run.arithmetic.store(rules.coordinates, total, node)


def _add(run: _Run, node: Node, a: Tensor, b: Tensor) -> Tensor:
    return run.arithmetic.store(a.coordinates, run.arithmetic.add(node, a, b), node)


def _relu(run: _Run, node: Node, x: Tensor) -> Tensor:
    return x.relu()


def _scatter(run: _Run, node: Node, x: Tensor) -> np.ndarray:
    values = x.read(node)
    dense = np.zeros(node["output_shape"], values.dtype)
    batch, *cells = x.coordinates.T
    dense[(batch, slice(None), *cells)] = values
    return dense


def _transpose(run: _Run, node: Node, x: np.ndarray) -> np.ndarray:
    return x.transpose(node["dims"])


def _reshape(run: _Run, node: Node, x: np.ndarray) -> np.ndarray:
    return x.reshape(node["dims"])


HANDLERS: dict[str, Callable] = {
    "SparseConvolution": _convolution,
    "Add": _add,
    "QuantAdd": _add,
    "Relu": _relu,
    "ScatterDense": _scatter,
    "Transpose": _transpose,
    "Reshape": _reshape,
}
