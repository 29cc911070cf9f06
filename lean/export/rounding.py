"""A model with the numbers that its LiDAR file holds, so that both compute the same."""

from torch import nn

from lean.export.sparse_nodes import half_precision
from lean.layers import QuantSparseConvolution
from lean.switches import named_quantizers


def round_to_file(backbone: nn.Module) -> nn.Module:
    """Round weights, biases and ranges of a quantised LiDAR backbone to FP16, in place, as `export_lidar` writes them.

    For voxel features of FP16 the backbone then gives what the file's integers give, up to the FP16 of the map itself.

    Raises:
        QuantizationError: a value is NaN or beyond the range of FP16.
    """
    for name, module in backbone.named_modules():
        if isinstance(module, QuantSparseConvolution):
            for what, parameter in module.named_parameters(recurse=False):
                parameter.data = half_precision(parameter, f"{name}.{what}").to(parameter)
    for name, quantizer in named_quantizers(backbone).items():
        if quantizer.amax is not None:
            quantizer.set_amax(half_precision(quantizer.amax, name).to(quantizer.amax))
    return backbone
