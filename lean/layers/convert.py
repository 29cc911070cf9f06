"""Which float layer becomes which quantised layer."""

from cumm import tensorview as tv
from spconv.pytorch.conv import SparseConvolution
from torch import nn

from lean.layers.base import QuantLayer
from lean.layers.conv import QuantConv2d, QuantConvTranspose2d
from lean.layers.joins import QuantAdd, QuantConcat
from lean.layers.linear import QuantLinear
from lean.layers.sparse import QuantSparseConvolution

BY_TYPE: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
    SparseConvolution: QuantSparseConvolution,
}
# The float model's joins: known by name, because this package imports nothing from the model.
BY_NAME: dict[str, type[QuantLayer]] = {"Add": QuantAdd, "Concat": QuantConcat}
# Subclasses whose own forward computes the same: mmcv's mind empty inputs, the model's mind spconv's threads.
SAME_FORWARD = {
    *(f"mmcv.cnn.bricks.wrappers.{name}" for name in ("Conv2d", "ConvTranspose2d", "Linear")),
    *(f"bevfusion.ops.sparse.{name}" for name in ("SubMConv3d", "SparseConv3d")),
}
# Their forward is never called: MultiheadAttention reads the weight itself.
BYPASSED = nn.modules.linear.NonDynamicallyQuantizableLinear


def quantised_form(module: nn.Module) -> type[QuantLayer] | None:
    """Return the quantised class for layers of `module`'s kind, None if there is none."""
    for base, target in BY_TYPE.items():
        if isinstance(module, base):
            return target
    return next((BY_NAME[base.__name__] for base in type(module).__mro__ if base.__name__ in BY_NAME), None)


def why_float(module: nn.Module) -> str | None:
    """Say why a layer with a weight matrix or kernel can't be quantised; None if it can, or has no such weight."""
    if quantised_form(module) is not None:
        return _obstacle(module)
    weight = module._parameters.get("weight")
    has_kernel = weight is not None and weight.dim() >= 2
    return f"{type(module).__name__} has no INT8 form" if has_kernel else None


def _obstacle(module: nn.Module) -> str | None:
    """Say why a layer of a known kind keeps its float form; None if nothing stands against quantising it."""
    if isinstance(module, QuantLayer):
        return "it is quantised already"
    if isinstance(module, BYPASSED):
        return "MultiheadAttention reads its weight without calling it"
    if isinstance(module, SparseConvolution) and module.act_type != tv.gemm.Activation.None_:
        return "it has an activation of spconv's own, which would come before the bias"
    kind = type(module)
    base = next((base for base in BY_TYPE if isinstance(module, base)), kind)
    if kind.forward is base.forward or f"{kind.__module__}.{kind.__qualname__}" in SAME_FORWARD:
        return None
    return f"{kind.__qualname__} computes something else than {base.__name__}"
