"""Turns quantizers on and off, and finds them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from lean.errors import QuantizationError
from lean.layers import QuantLayer
from lean.matching import select
from lean.sharing import sharing_groups


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a data-parallel wrapper, or `model` itself."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantised layers by name, in module order."""
    return {name: layer for name, layer in unwrap(model).named_modules() if isinstance(layer, QuantLayer)}


def named_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Return every quantizer once, by its first name in module order."""
    return {name: q for name, q in unwrap(model).named_modules() if isinstance(q, TensorQuantizer)}


@contextmanager
def quantizer_flags(quantizers: Iterable[TensorQuantizer], **flags: Any) -> Iterator[None]:
    """Set attributes such as `_if_calib` of the quantizers for the length of a `with` block."""
    found = [(quantizer, {flag: getattr(quantizer, flag) for flag in flags}) for quantizer in quantizers]
    try:
        for quantizer, _ in found:
            vars(quantizer).update(flags)
        yield
    finally:
        for quantizer, before in found:
            vars(quantizer).update(before)


class _Switch:
    """Sets all quantizers at or below `model`: for good with `apply()`, or for the length of a `with` block."""

    disabled: bool

    def __init__(self, model: nn.Module):
        self.quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
        self._contexts: list = []

    def apply(self) -> Self:
        """Set the quantizers until something else sets them."""
        for quantizer in self.quantizers:
            quantizer._disabled = self.disabled
        return self

    def __enter__(self) -> Self:
        context = quantizer_flags(self.quantizers, _disabled=self.disabled)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.pop().__exit__(kind, error, trace)


class disable_quantization(_Switch):
    """Let the layers at or below a module compute in floating point.

    A quantizer that is shared with layers elsewhere is off for them too; `disable_layers` refuses that.
    """

    disabled = True


class enable_quantization(_Switch):
    """Let the layers at or below a module quantise again."""

    disabled = False


def disable_layers(model: nn.Module, patterns: Iterable[str], what: str = "disable pattern") -> list[str]:
    """Leave the quantised layers that fit the glob `patterns` in floating point, and return their names.

    Raises:
        QuantizationError: a pattern fits no quantised layer, or the layers are part of a group that shares a
            quantizer while the rest of the group stays quantised.
    """
    layers = quantized_layers(model)
    chosen = select(patterns, layers, what)
    for group in sharing_groups(unwrap(model)):
        inside = [name for name in group if name in chosen]
        outside = [name for name in group if name not in chosen and not layers[name].is_disabled]
        if inside and outside:
            raise QuantizationError(
                f"{what}: {inside[0]} shares its input scale with {', '.join(outside)}; disable all of them or none"
            )
    for name in chosen:
        disable_quantization(layers[name]).apply()
    return chosen
