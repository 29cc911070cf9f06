"""The few names that differ between the reference's quantised modules and ours."""

import re

RENAMED = (
    (r"\.quant_add$", ".add"),
    (r"\.quant_concat0$", ".concats.1"),  # numbered there in the order of use, coarse level first
    (r"\.quant_concat1$", ".concats.0"),
)
# A residual's identity has a bare quantizer there; here the add is a layer that has it.
RESIDUAL = (r"\.residual_quantizer$", ".add._input_quantizer")


def our_layer(reference: str) -> str:
    """Our name of the reference's quantised module."""
    for pattern, ours in RENAMED:
        reference = re.sub(pattern, ours, reference)
    return reference


def our_quantizer(reference: str) -> str:
    """Our name of the reference's quantizer."""
    layer, _, leaf = re.sub(*RESIDUAL, reference).rpartition(".")
    return f"{our_layer(layer)}.{leaf}"
