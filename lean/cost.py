"""What each layer costs in a frame: multiply-accumulates (MACs), values moved, and which layers feed it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from spconv.pytorch import SparseConvTensor
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lean.layers import QuantLayer
from lean.rulebook import neighbours
from lean.switches import quantized_layers, unwrap

CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.Linear, SparseConvolution)


@dataclass(frozen=True)
class LayerCost:
    """What one layer does in one frame.

    Attributes:
        kind: class name of the layer.
        macs: multiply-accumulates; none for joins, whose additions are not counted.
        inputs, weights, outputs: numbers of values read and written.
        producers: layers whose outputs reach its inputs with no other layer between.
    """

    kind: str
    macs: int
    inputs: int
    weights: int
    outputs: int
    producers: tuple[str, ...] = ()

    def bytes_at(self, width: int) -> int:
        """Bytes moved, if every value takes `width` bytes: 1 in INT8, 2 in FP16, 4 in FP32."""
        return (self.inputs + self.weights + self.outputs) * width


def measure_costs(model: nn.Module, forward: Callable[[], Any]) -> dict[str, LayerCost]:
    """Cost of every convolution, linear layer, attention and quantised join that `forward`, one frame, calls, by name.

    Of an attention its projections count, the two products between its inputs do not. A layer that runs several times
    has the sum of its runs. Producers are found by following every tensor operation of the frame.

    Raises:
        QuantizationError: a sparse convolution is transposed or inverse.
    """
    found: dict[str, LayerCost] = {}
    flow = _Flow()

    def note(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        one = replace(layer_cost(module, args, output), producers=tuple(sorted(flow.of(args))))
        found[name] = _sum(found[name], one) if name in found else one
        for tensor in tensors_in(output):
            flow.sources[tensor] = frozenset([name])

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, module, args, output))
        for name, module in unwrap(model).named_modules()
        if isinstance(module, (*CONVOLUTIONS, nn.MultiheadAttention, QuantLayer))
    ]
    try:
        with torch.no_grad(), flow:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def layer_cost(module: nn.Module, args: tuple, output: Any) -> LayerCost:
    """Cost of one run of a layer, given its inputs and its output; without producers."""
    inputs = sum(tensor.numel() for tensor in tensors_in(args))
    outputs = sum(tensor.numel() for tensor in tensors_in(output))
    own = [getattr(module, name, None) for name in ("weight", "bias")]
    weights = sum(p.numel() for p in own if isinstance(p, Tensor))
    macs = 0
    if isinstance(module, SparseConvolution):
        pairs = int((neighbours(module, args[0], output) >= 0).sum())
        macs = pairs * module.in_channels * module.out_channels // module.groups
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        macs = inputs * module.out_channels // module.groups * prod(module.kernel_size)
    elif isinstance(module, nn.modules.conv._ConvNd):
        macs = outputs * module.in_channels // module.groups * prod(module.kernel_size)
    elif isinstance(module, nn.Linear):
        macs = outputs * module.in_features
    elif isinstance(module, nn.MultiheadAttention):
        outputs = output[0].numel()
        macs = (sum(tensor.numel() for tensor in args[:3]) + outputs) * module.embed_dim
        weights = sum(parameter.numel() for parameter in module.parameters())
    return LayerCost(type(module).__name__, int(macs), inputs, weights, outputs)  # spconv's sizes are numpy's


def _sum(a: LayerCost, b: LayerCost) -> LayerCost:
    producers = tuple(sorted({*a.producers, *b.producers}))
    return LayerCost(a.kind, a.macs + b.macs, a.inputs + b.inputs, a.weights, a.outputs + b.outputs, producers)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested sequences, mappings and sparse tensors (their features)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, SparseConvTensor):
        yield value.features
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


class _Flow(TorchDispatchMode):
    """Remembers for every tensor the layers whose outputs it was computed from."""

    def __init__(self):
        super().__init__()
        self.sources = WeakIdKeyDictionary()

    def of(self, value: Any) -> frozenset[str]:
        return frozenset().union(*(self.sources.get(tensor, ()) for tensor in tensors_in(value)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sources = self.of(args) | self.of(kwargs)
        if sources:
            for tensor in tensors_in(result):
                self.sources[tensor] = sources
        return result


def int8_layers(model: nn.Module) -> set[str]:
    """Names of the layers that compute in INT8 as the model stands."""
    return {name for name, layer in quantized_layers(model).items() if not layer.is_disabled}


def int8_share(costs: Mapping[str, LayerCost], int8: Collection[str], among: Collection[str] | None = None) -> float:
    """Part, from 0 to 1, of the MACs of the layers `among` (None: of the whole model, heads too) done by `int8`."""
    everyone = costs if among is None else [name for name in among if name in costs]
    total = sum(costs[name].macs for name in everyone)
    return sum(costs[name].macs for name in everyone if name in int8) / total if total else 0.0


@dataclass(frozen=True)
class CostModel:
    """Estimated time of a frame, in INT8 MACs' worth, by which layers run in INT8; all others run in FP16.

    A layer takes what is longer, computing (FP16 at half the rate) or moving its values (FP16 twice the bytes). A layer
    whose output goes to one of the other precision costs another pass over that output: reading it at one width and
    writing it at the other.

    Attributes:
        macs_per_byte: INT8 MACs that a machine does in the time it moves a byte. 200 is about a Jetson AGX Orin's
            (42e12 MAC/s, 2.0e11 byte/s); an H100 has 300.
    """

    costs: Mapping[str, LayerCost]
    macs_per_byte: float = 200.0

    def layer(self, name: str, width: int) -> float:
        """Time of one layer at `width` bytes a value."""
        cost = self.costs[name]
        return max(cost.macs * width, cost.bytes_at(width) * self.macs_per_byte)

    def borders(self, int8: Collection[str]) -> set[str]:
        """Layers whose output has to be converted for at least one of the layers that read it."""
        pairs = ((producer, name) for name, cost in self.costs.items() for producer in cost.producers)
        return {producer for producer, name in pairs if (producer in int8) != (name in int8)}

    def time(self, int8: Collection[str]) -> float:
        """Time of the frame."""
        layers = sum(self.layer(name, 1 if name in int8 else 2) for name in self.costs)
        return layers + sum(3 * self.costs[name].outputs for name in self.borders(int8)) * self.macs_per_byte
