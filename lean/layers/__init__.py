"""Quantised layers, one small file each, and the table that says which float layer becomes which."""

from lean.layers.base import LayerSpec, QuantLayer
from lean.layers.conv import QuantConv2d, QuantConvTranspose2d
from lean.layers.convert import quantised_form, why_float
from lean.layers.joins import QuantAdd, QuantConcat
from lean.layers.linear import QuantLinear
from lean.layers.sparse import QuantSparseConvolution

__all__ = [
    "LayerSpec",
    "QuantAdd",
    "QuantConcat",
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantLayer",
    "QuantLinear",
    "QuantSparseConvolution",
    "quantised_form",
    "why_float",
]
