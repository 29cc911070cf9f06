"""Functional joins as parameterless modules, so that replacing one is a swap of a submodule."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """Residual add of two tensors of one shape."""

    def forward(self, out: Tensor, identity: Tensor) -> Tensor:
        """Return `out + identity`."""
        return out + identity


class Concat(nn.Module):
    """Concatenation along `dim`."""

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors joined along `dim`."""
        return torch.cat(list(tensors), dim=self.dim)
