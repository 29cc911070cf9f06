"""What quantisation made of a float model, as data: enough to make it again of a float model just built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pytorch_quantization.calib import MaxCalibrator
from pytorch_quantization.nn import TensorQuantizer
from torch import Tensor, nn

from lean.calibrate import check_calibrated
from lean.errors import QuantizationError
from lean.layers import LayerSpec, QuantAdd, QuantLayer, QuantSparseConvolution, quantised_form, why_float
from lean.quantizer import Quantizer
from lean.recipe import Data, QuantizerSpec
from lean.switches import named_quantizers, quantized_layers
from lean.walker import replace_modules


@dataclass(frozen=True)
class QuantizerState(Data):
    """A quantizer, but for its amax; `axis`: None means one scale for the whole tensor."""

    name: str
    num_bits: int
    axis: int | None
    unsigned: bool
    narrow_range: bool
    calibrator: str
    disabled: bool


@dataclass(frozen=True)
class LayerState(Data):
    """A quantised layer: its class, the names of its quantizers (several layers may name one), and its own options."""

    name: str
    kind: str
    input: str
    weight: str | None
    inputs: str = "all"
    activation: str = "none"


@dataclass(frozen=True)
class Structure(Data):
    """Quantised layers, their quantizers, and the modules that were folded or fused away."""

    layers: tuple[LayerState, ...]
    quantizers: tuple[QuantizerState, ...]
    identities: tuple[str, ...]


def describe(model: nn.Module) -> Structure:
    """Return what quantisation made of `model`.

    Raises:
        QuantizationError: a quantizer has more than one axis.
    """
    names = {quantizer: name for name, quantizer in named_quantizers(model).items()}
    layers = []
    for name, layer in quantized_layers(model).items():
        weight = getattr(layer, "_weight_quantizer", None)
        options = {"inputs": layer.inputs} if isinstance(layer, QuantAdd) else {}
        if isinstance(layer, QuantSparseConvolution):
            options = {"activation": layer.activation}
        kind = type(layer).__name__
        layers.append(LayerState(name, kind, names[layer._input_quantizer], weight and names[weight], **options))
    identities = tuple(name for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Identity)
    return Structure(tuple(layers), tuple(_state(q, name) for q, name in names.items()), identities)


def _state(quantizer: TensorQuantizer, name: str) -> QuantizerState:
    axis = quantizer.axis
    if isinstance(axis, tuple):
        if len(axis) != 1:
            raise QuantizationError(f"{name} has the axes {axis}: only one can be saved")
        axis = axis[0]
    kind = "max" if isinstance(quantizer._calibrator, MaxCalibrator) else "histogram"
    flags = bool(quantizer._unsigned), bool(quantizer._narrow_range)
    return QuantizerState(name, quantizer._num_bits, axis, *flags, kind, bool(quantizer._disabled))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each tensor once, by its first name."""
    found, seen = {}, set()
    for prefix, module in model.named_modules():
        kept = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for leaf, tensor in [*module._parameters.items(), *kept.items()]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{leaf}".lstrip(".")] = tensor
    return found


def impose(model: nn.Module, structure: Structure, tensors: Mapping[str, Tensor]) -> None:
    """Make of a float model, in place, the quantised model that `structure` and `tensors` describe.

    Raises:
        QuantizationError: they don't fit the float model.
    """
    _check_names(model, structure)
    quantizers = {state.name: _quantizer(state) for state in structure.quantizers}
    layers = {state.name: state for state in structure.layers}

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        if name in layers:
            return _layer(module, layers[name], quantizers)
        return nn.Identity() if name in structure.identities and type(module) is not nn.Identity else None

    replace_modules(model, swap)
    _fill(model, tensors)
    _check_amax(model)
    if describe(model) != structure:
        raise QuantizationError("the layers that were saved don't fit the model of the saved config")


def _check_names(model: nn.Module, structure: Structure) -> None:
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known = {state.name for state in structure.quantizers}
    for name in [*(layer.name for layer in structure.layers), *structure.identities]:
        if name not in names:
            raise QuantizationError(f"{name} was saved, but the model of the saved config has no such module")
    for layer in structure.layers:
        for quantizer in filter(None, (layer.input, layer.weight)):
            if quantizer not in known:
                raise QuantizationError(f"{layer.name} names the quantizer {quantizer}, which was not saved")


def _quantizer(state: QuantizerState) -> Quantizer:
    spec = QuantizerSpec(state.num_bits, state.calibrator, state.unsigned, state.narrow_range)
    quantizer = Quantizer(spec, state.axis)
    quantizer._disabled = state.disabled
    return quantizer


def _layer(module: nn.Module, state: LayerState, quantizers: Mapping[str, Quantizer]) -> QuantLayer:
    form = quantised_form(module)
    if form is None or form.__name__ != state.kind or (why := why_float(module)):
        reason = why if form is not None and form.__name__ == state.kind else f"it is a {type(module).__name__}"
        raise QuantizationError(f"{state.name} was saved as a {state.kind}, but can't become one: {reason}")
    layer = form.from_float(module, LayerSpec(QuantizerSpec(), QuantizerSpec(calibrator="max"), state.inputs))
    layer._input_quantizer = quantizers[state.input]
    if state.weight is not None:
        layer._weight_quantizer = quantizers[state.weight]
    if isinstance(layer, QuantSparseConvolution):
        layer.activation = state.activation
    return layer


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set every parameter and buffer; make those that folding and calibration created."""
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(prefix)
        except AttributeError:
            raise QuantizationError(f"tensor {name} was saved, but the model has no module {prefix}") from None
        if owner._parameters.get(leaf, tensor) is None:
            _check_type(name, tensor, tensor.dtype == owner.weight.dtype)
            owner._parameters[leaf] = nn.Parameter(tensor, owner.weight.requires_grad)
        elif leaf == "_amax" and isinstance(owner, Quantizer):
            _check_type(name, tensor, tensor.is_floating_point())
            owner.set_amax(tensor)
    own = stored_tensors(model)
    if odd := sorted(own.keys() ^ tensors.keys()):
        side = "saved" if odd[0] in tensors else "in the model"
        raise QuantizationError(f"tensor {odd[0]} is only {side} ({len(odd)} differ): the saved config is another one")
    for name, tensor in own.items():
        saved = tensors[name]
        if (tensor.shape, tensor.dtype) != (saved.shape, saved.dtype):
            kinds = " but the model wants ".join(
                f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (saved, tensor)
            )
            raise QuantizationError(f"tensor {name} was saved as {kinds}")
        if saved.is_floating_point() and not torch.isfinite(saved).all():
            raise QuantizationError(f"tensor {name} holds NaN or infinity")
        tensor.data = saved


def _check_type(name: str, tensor: Tensor, fits: bool) -> None:
    """Refuse a tensor that the float model has no like of, and whose type is none that the layer can compute with."""
    if not fits:
        raise QuantizationError(f"tensor {name} was saved as {tensor.dtype}, which its layer can't compute with")


def _check_amax(model: nn.Module) -> None:
    """Refuse an amax that doesn't fit its quantizer's axis, or isn't a scale."""
    for name, layer in quantized_layers(model).items():
        for quantizer in layer.quantizers:
            amax, axis = quantizer.amax, quantizer.axis
            weight = getattr(layer, "weight", None)
            if amax is None or quantizer is layer._input_quantizer:
                fits = amax is None or (axis is None and amax.dim() == 0)
            else:
                per_index = [size if dim == axis else 1 for dim, size in enumerate(weight.shape)]
                fits = list(amax.shape) == ([] if axis is None else per_index)
            if not fits:
                raise QuantizationError(f"{name}: amax of shape {tuple(amax.shape)} does not fit the axis {axis}")
    check_calibrated(model)
