"""Each quantised layer on the input that it gets in the float model, against the reference's digests."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from spconv.pytorch import SparseConvTensor
from torch import nn

from lean.layers import QuantLayer, QuantSparseConvolution
from lean.switches import disable_quantization, named_quantizers, quantized_layers, quantizer_flags
from tests.golden_model import relative_error, sample_indices
from tests.lean.golden_names import our_layer


def reference_rows(coordinates: np.ndarray, layer: QuantSparseConvolution) -> np.ndarray:
    """Output coordinates (V', 4) of a strided sparse convolution in spconv 1's order, for inputs (V, 4) in its order.

    It numbers outputs as it meets them: input by input, each input's outputs from the highest position down, z fastest.
    """
    axes = []
    for axis in range(3):
        kernel, stride, padding = layer.kernel_size[axis], layer.stride[axis], layer.padding[axis]
        highest = (coordinates[:, axis + 1] + padding) // stride
        lowest = -(-(coordinates[:, axis + 1] + padding - kernel + 1) // stride)
        steps = np.arange(-(-kernel // stride))
        axes.append(np.where(highest[:, None] - steps >= lowest[:, None], highest[:, None] - steps, -1))
    x, y, z = np.broadcast_arrays(axes[0][:, :, None, None], axes[1][:, None, :, None], axes[2][:, None, None, :])
    positions = np.stack([x.ravel(), y.ravel(), z.ravel()], 1)
    positions = positions[(positions >= 0).all(1)]
    _, first = np.unique(positions, axis=0, return_index=True)
    found = positions[np.sort(first)]
    return np.concatenate([np.zeros_like(found[:, :1]), found], 1)


def permutation(coordinates: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Indices that bring rows at `coordinates` into the order of `wanted`, which may have more rows."""
    place = {tuple(row): index for index, row in enumerate(coordinates)}
    return np.array([place[key] for row in wanted if (key := tuple(row)) in place])


class LocalOutputs:
    """Runs the float model, and each of its quantised layers with its own quantizers on what reaches it.

    `errors` is the relative error of each layer's output against the reference's. The reference stores sparse tensors
    sorted by coordinates, but an add's features in the order in which its spconv 1 numbered the voxels.
    """

    def __init__(self, reference: SimpleNamespace):
        self.reference, self.errors = reference, {}
        self.names = {our_layer(name): name for name in reference.ptq_modules["local_quant"]}
        self.indices = self.order = None

    def run(self, model: nn.Module, frame: dict, replaced: dict[str, QuantLayer]) -> None:
        """Fill `errors`; `replaced` holds layers that stand in for the model's."""
        layers = {name: layer for name, layer in quantized_layers(model).items() if name in self.names}
        on = {q for q in named_quantizers(model).values() if not q._disabled}
        handles = [
            layer.register_forward_hook(partial(self.measure, name, replaced.get(name, layer), on))
            for name, layer in layers.items()
        ]
        try:
            with torch.no_grad(), disable_quantization(model):
                model(**frame)
        finally:
            for handle in handles:
                handle.remove()

    def measure(self, name: str, layer: QuantLayer, on: set, _: nn.Module, inputs: tuple, float_output) -> None:
        """Compare the output that `layer`, with those of its quantizers that are in `on`, gives for `inputs`."""
        if isinstance(float_output, SparseConvTensor):
            self.follow(layer, inputs[0], float_output)
        with quantizer_flags([q for q in layer.quantizers if q in on], _disabled=False):
            output = layer.forward(*inputs)
        if isinstance(output, SparseConvTensor):
            rows = output.features.numpy()[np.lexsort(self.indices.T[::-1])]
        else:
            rows = output.numpy()
            rows = rows[permutation(self.indices, self.order)] if rows.ndim == 2 else rows
        prefix = f"local_quant/{self.names[name]}"
        np.testing.assert_array_equal(sample_indices(rows.size, 256), self.reference.modules[f"{prefix}/idx"])
        self.errors[name] = relative_error(rows, self.reference.modules[f"{prefix}/val"], 256)

    def follow(self, layer: QuantSparseConvolution, before: SparseConvTensor, after: SparseConvTensor) -> None:
        """Keep the coordinates of our rows and of the reference's up to date."""
        if self.order is None:
            self.order = before.indices.numpy()
        if not layer.subm:
            self.order = reference_rows(self.order, layer)
        self.indices = after.indices.numpy()
