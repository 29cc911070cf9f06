"""Moves ReLUs of the sparse branch into its quantised convolutions, as the deployed kernels compute them."""

import itertools

from spconv.pytorch import SparseSequential
from torch import nn

from lean.errors import QuantizationError
from lean.layers import QuantSparseConvolution
from lean.walker import replace_modules


def fuse_relu(backbone: nn.Module) -> list[str]:
    """Let every quantised sparse convolution apply the ReLU that follows it; return those convolutions' names.

    The ReLU after a convolution in a sequence is replaced by an identity. A residual block uses one ReLU twice, so it
    stays; applied after the first convolution for the second time it changes nothing.

    Raises:
        QuantizationError: a batch normalisation stands between a convolution and its ReLU.
    """
    fused, removed = [], set()
    for name, module in backbone.named_modules():
        if isinstance(module, SparseSequential):
            convs = _fuse_sequence(name, module, removed)
        elif isinstance(getattr(module, "relu", None), nn.ReLU):
            convs = _fuse_block(name, module)
        else:
            convs = []
        fused += [f"{name}.{child}".lstrip(".") for child in convs]
    replace_modules(backbone, lambda name, _: nn.Identity() if name in removed else None)
    return fused


def _fuse_sequence(name: str, sequence: SparseSequential, removed: set[str]) -> list[str]:
    """Mark convolutions followed by a ReLU, and add the ReLU's full name to `removed`."""
    children = [(child, m) for child, m in sequence._modules.items() if not isinstance(m, nn.Identity)]
    fused = []
    for (child, conv), (follower, act) in itertools.pairwise(children):
        if not isinstance(conv, QuantSparseConvolution):
            continue
        _refuse_norm(name, child, act)
        if isinstance(act, nn.ReLU):
            conv.activation = "relu"
            removed.add(f"{name}.{follower}".lstrip("."))
            fused.append(child)
    return fused


def _fuse_block(name: str, block: nn.Module) -> list[str]:
    """Mark the first convolution of a residual block."""
    conv = getattr(block, "conv1", None)
    if not isinstance(conv, QuantSparseConvolution):
        return []
    _refuse_norm(name, "conv1", getattr(block, getattr(block, "norm1_name", "bn1"), None))
    conv.activation = "relu"
    return ["conv1"]


def _refuse_norm(parent: str, child: str, follower: nn.Module | None) -> None:
    if isinstance(follower, nn.modules.batchnorm._BatchNorm):
        raise QuantizationError(f"{parent}.{child}: fold its batch normalisation before fusing the ReLU")
