"""How a sparse network computes: in floating point, or in the integers of the INT8 kernels.

A layer hands on a tensor in the precision that the next ones read. An `int8` tensor is kept once for each range that
its readers state, since the file gives ranges to inputs and none to outputs; it is quantised from the real numbers that
the kernel has at hand after dequantising its accumulators.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lean.errors import QuantizationError
from lean.export.scn_graph import Graph, Node
from lean.export.scn_rulebook import Rulebook

LEVELS = 127  # of a symmetric int8 range; -128 is used as well, as in the fake quantizer
EXACT = 2**24  # float32 holds every integer up to here
LARGEST = 128 * 128  # product of two int8


@dataclass
class Tensor:
    """Features of the voxels at `coordinates`, int64 (V, 4).

    Attributes:
        values: floating (V, C), None if stored as integers only.
        integers: int8 (V, C) by range.
    """

    coordinates: np.ndarray
    values: np.ndarray | None
    integers: dict[float, np.ndarray] = field(default_factory=dict)

    def read(self, node: Node) -> np.ndarray:
        """Return the values (V, C) for `node`, as they are stored."""
        if self.values is None:
            raise QuantizationError(f"{node.name} reads fp16, but its input is stored as int8")
        return self.values

    def read_int8(self, bound: float) -> np.ndarray:
        """Return the values as int8 (V, C) of the range -bound to bound."""
        return quantise(self.values, bound) if self.values is not None else self.integers[bound]

    def relu(self) -> "Tensor":
        """Return max(x, 0), stored in the same form."""
        values = None if self.values is None else np.maximum(self.values, 0)
        return Tensor(self.coordinates, values, {bound: np.maximum(q, 0) for bound, q in self.integers.items()})


def quantise(values: np.ndarray, bound: float | np.ndarray) -> np.ndarray:
    """Round values / step to int8, half to even, where step = `bound` / 127; in float32, as kernels do it."""
    scaled = values.astype(np.float32) * (np.float32(LEVELS) / np.float32(bound))
    return np.clip(np.rint(scaled), -LEVELS - 1, LEVELS).astype(np.int8)


def convolve(features: np.ndarray, weight: np.ndarray, rules: Rulebook) -> np.ndarray:
    """Sum over the taps: gather input rows, multiply by the tap's matrix, add to the output rows.

    Args:
        features: floating (V, in).
        weight: of the same type, (out, kx, ky, kz, in).

    Returns:
        (V', out) of the same type.
    """
    total = np.zeros((len(rules.coordinates), len(weight)), features.dtype)
    for matrix, (source, target) in zip(_taps(weight), rules.pairs, strict=True):
        total[target] += features[source] @ matrix
    return total


def convolve_int8(features: np.ndarray, weight: np.ndarray, rules: Rulebook) -> np.ndarray:
    """Do the same for int8 arguments, with int32 sums."""
    total = np.zeros((len(rules.coordinates), len(weight)), np.int32)
    # float32 products are much faster than those of integers, and exact over this many channels.
    block = EXACT // LARGEST
    for start in range(0, features.shape[1], block):
        part = features[:, start : start + block].astype(np.float32)
        matrices = _taps(weight[..., start : start + block]).astype(np.float32)
        for matrix, (source, target) in zip(matrices, rules.pairs, strict=True):
            total[target] += (part[source] @ matrix).astype(np.int32)
    return total


def _taps(weight: np.ndarray) -> np.ndarray:
    """Bring (out, kx, ky, kz, in) to (taps, in, out)."""
    return weight.reshape(weight.shape[0], -1, weight.shape[-1]).transpose(1, 2, 0)


class FloatArithmetic:
    """Every layer computes and stores floating point numbers, whatever its precision.

    Args:
        dtype: of the computation; weights and biases are those of the file.
    """

    def __init__(self, dtype: type = np.float32):
        self.dtype = dtype

    def store(self, coordinates: np.ndarray, values: np.ndarray, node: Node | None = None) -> Tensor:
        """Hand on the output of `node`, or the network's input."""
        return Tensor(coordinates, values.astype(self.dtype))

    def convolve(self, node: Node, x: Tensor, weight: np.ndarray, rules: Rulebook) -> np.ndarray:
        """Return the sums (V', out) before bias and activation."""
        return convolve(x.read(node).astype(self.dtype), weight.astype(self.dtype), rules)

    def add(self, node: Node, a: Tensor, b: Tensor) -> np.ndarray:
        """Return the sum of two tensors of one shape."""
        return a.read(node).astype(self.dtype) + b.read(node).astype(self.dtype)


class IntegerArithmetic(FloatArithmetic):
    """int8 layers multiply int8 by int8 and sum in int32; fp16 layers multiply fp16 numbers and sum in float64.

    All else (dequantisation, bias, requantisation) is done in float32, operation by operation as the PyTorch layers do
    it: a quantised network amplifies a different rounding until it is as large as the quantisation error.

    Args:
        graph: says in which ranges each tensor is read.
    """

    def __init__(self, graph: Graph):
        super().__init__(np.float64)
        self.graph = graph

    def store(self, coordinates: np.ndarray, values: np.ndarray, node: Node | None = None) -> Tensor:
        """Round to the output precision of `node`; the network's input is fp16.

        Raises:
            QuantizationError: a value is beyond the range of fp16.
        """
        if node is not None and node["output_precision"] == "int8":
            ranges = self._ranges(node.output)
            return Tensor(coordinates, None, {bound: quantise(values, bound) for bound in ranges})
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise QuantizationError(f"the output of {node.name if node else 'the voxelisation'} overflows fp16")
        return Tensor(coordinates, half)

    def convolve(self, node: Node, x: Tensor, weight: np.ndarray, rules: Rulebook) -> np.ndarray:
        """Return the sums (V', out) before bias and activation, as real numbers."""
        if node["precision"] != "int8":
            return super().convolve(node, x, weight, rules)
        bound, bounds = node["input_dynamic_range"], np.array(node["weight_dynamic_ranges"])
        total = convolve_int8(x.read_int8(bound), quantise(weight, bounds.reshape(-1, 1, 1, 1, 1)), rules)
        steps = np.float32(bound) / np.float32(LEVELS) * (bounds.astype(np.float32) / np.float32(LEVELS))
        return total.astype(np.float32) * steps

    def add(self, node: Node, a: Tensor, b: Tensor) -> np.ndarray:
        """Return the sum of two tensors of one shape, as real numbers."""
        if node["precision"] != "int8":
            return super().add(node, a, b)
        bounds = node["input0_dynamic_range"], node["input1_dynamic_range"]
        x, y = (t.read_int8(bound).astype(np.int32) for t, bound in zip((a, b), bounds, strict=True))
        # Divided as the fake quantizer does it: at ranges of few digits the next rounding can meet exact ties.
        scales = [np.float32(LEVELS) / np.float32(bound) for bound in bounds]
        return x.astype(np.float32) / scales[0] + y.astype(np.float32) / scales[1]

    def _ranges(self, tensor: str) -> Sequence[float]:
        """Ranges in which `tensor` is read, through ReLUs, each once."""
        found: dict[float, None] = {}
        for reader in self.graph.readers(tensor):
            if reader.op == "Relu":
                found.update(dict.fromkeys(self._ranges(reader.output)))
            elif reader.op == "SparseConvolution":
                found[reader["input_dynamic_range"]] = None
            elif reader.op in ("Add", "QuantAdd"):
                places = (place for place, name in enumerate(reader.inputs) if name == tensor)
                found.update((reader[f"input{place}_dynamic_range"], None) for place in places)
        return list(found)
