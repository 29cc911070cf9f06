"""Recording of a LiDAR backbone: which of its layers ran, on which tensors, over which grids."""

from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from spconv.pytorch import SparseConvTensor
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor, nn

from lean.errors import QuantizationError
from lean.layers import QuantAdd


@dataclass(frozen=True)
class Call:
    """One run of one layer.

    Attributes:
        name: dotted name of the layer.
        inputs, output: numbers of the feature tensors it read and made; 0 is the backbone's input.
        before, after: cells of the grid along x, y, z before and after a convolution, empty for other layers.
    """

    name: str
    layer: nn.Module
    inputs: tuple[int, ...]
    output: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Tracer:
    """Records the convolutions, adds and ReLUs of `backbone` that run inside a `with` block, by forward hooks.

    Feature tensors are told apart by identity; every one is kept until the tracer goes, so that none can take another's
    place. An in-place ReLU gives its tensor a new number: from then on that is what the tensor holds.

    Attributes:
        calls: in the order in which they ran.
        tensors: features (V, C) by number.
        sparse: output of the last convolution, for its coordinates and grid.
    """

    def __init__(self, backbone: nn.Module, features: Tensor):
        self.backbone = backbone
        self.calls: list[Call] = []
        self.tensors = [features]
        self.sparse: SparseConvTensor | None = None
        self._handles: list = []

    def __enter__(self) -> Self:
        for name, module in self.backbone.named_modules():
            if isinstance(module, SparseConvolution):
                self._handles.append(module.register_forward_hook(partial(self._convolution, name)))
            elif isinstance(module, nn.ReLU | QuantAdd):
                self._handles.append(module.register_forward_hook(partial(self._elementwise, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _convolution(self, name: str, layer: nn.Module, inputs: tuple, output: SparseConvTensor) -> None:
        source = inputs[0]
        grids = tuple(source.spatial_shape), tuple(output.spatial_shape)
        self.sparse = output
        self._record(name, layer, (source.features,), output.features, *grids)

    def _elementwise(self, name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._record(name, layer, inputs, output)

    def _record(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, *grids: tuple) -> None:
        numbers = tuple(self._number(tensor, name) for tensor in inputs)
        self.tensors.append(output)
        self.calls.append(Call(name, layer, numbers, len(self.tensors) - 1, *grids))

    def _number(self, tensor: Tensor, reader: str) -> int:
        for number in reversed(range(len(self.tensors))):
            if self.tensors[number] is tensor:
                return number
        raise QuantizationError(
            f"{reader} reads a tensor that no convolution, add or ReLU made: the runtime has no layer for what made it"
        )
