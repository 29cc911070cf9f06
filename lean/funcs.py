"""The names that users' scripts call to fold and fuse; the work is done by `lean.fold` and `lean.fuse`."""

from torch import nn

from lean.fold import fold_dense, fold_sparse
from lean.fuse import fuse_relu

__all__ = ["fuse_conv_bn", "fuse_relu_only", "layer_fusion_bn"]


def layer_fusion_bn(backbone: nn.Module) -> nn.Module:
    """Fold the batch normalisations of the LiDAR backbone into its sparse convolutions, in place; return `backbone`."""
    fold_sparse(backbone)
    return backbone


def fuse_relu_only(backbone: nn.Module) -> nn.Module:
    """Let the LiDAR backbone's quantised convolutions apply their ReLUs themselves, in place; return `backbone`.

    The outputs stay the same, bit for bit.
    """
    fuse_relu(backbone)
    return backbone


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fold every 2D batch normalisation that follows a (transposed) convolution, in place; return `model`."""
    fold_dense(model)
    return model
