"""Signal-to-quantisation-noise ratios: of each layer on its own, and of what parts of the network hand on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_quantization.nn import TensorQuantizer
from spconv.pytorch import SparseConvTensor
from torch import Tensor, nn

from lean.calibrate import Forward, check_calibrated, evaluating
from lean.errors import QuantizationError
from lean.layers import QuantLayer
from lean.matching import no_match
from lean.switches import disable_quantization, named_quantizers, quantized_layers, quantizer_flags, unwrap

PARTS = ("both", "inputs", "weights")


@dataclass(frozen=True)
class Noise:
    """Sums of squares, over all values, of a signal and of what quantisation changed in it; adds up over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def __add__(self, other: Noise) -> Noise:
        return Noise(self.signal + other.signal, self.noise + other.noise)

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise): infinite without noise, minus infinite without a signal, NaN if either is NaN."""
        if math.isnan(self.signal) or math.isnan(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    @property
    def is_finite(self) -> bool:
        """Whether neither signal nor noise holds NaN or infinity."""
        return math.isfinite(self.signal) and math.isfinite(self.noise)

    @property
    def relative(self) -> float:
        """L2 norm of the noise over that of the signal."""
        return 10 ** (-self.sqnr_db / 20)


@dataclass(frozen=True)
class Measured:
    """What `measure_noise` found.

    Attributes:
        layers: part (`both`, `inputs`, `weights`) -> layer -> noise in its own output, on the input it has in the
            float network.
        outputs: module -> noise in its output, float network against quantised network.
        batches: how many batches were measured.
    """

    layers: Mapping[str, Mapping[str, Noise]]
    outputs: Mapping[str, Noise]
    batches: int


def measure_noise(
    model: nn.Module,
    batches: Iterable,
    forward: Forward,
    *,
    parts: Sequence[str] = ("both",),
    layers: Iterable[str] | None = None,
    outputs: Sequence[str] = (),
    after_batch: Callable[[int, Any], None] | None = None,
) -> Measured:
    """Run every batch through the float network, and each layer besides with its own quantizers on its float input.

    With `outputs` every batch runs through the quantised network as well. The model is as before afterwards, also when
    a forward raises; inputs are not written to. Kept in memory are the `outputs` of one batch, and two numbers a layer.

    Args:
        model: calibrated, wrapped or not.
        forward: called with (model, batch).
        parts: which quantizers of a layer are on: `both`, its `inputs` alone, its `weights` alone. A layer that has no
            quantizer of a part is left out there.
        layers: names of the layers to measure, each with all its quantizers on; by default those that are quantised,
            as they are.
        outputs: names of modules whose outputs are compared; see `output_module`.
        after_batch: called with a batch's number, from 1, and the batch.

    Raises:
        QuantizationError: a quantizer isn't calibrated, or a name or a part is unknown.
    """
    check_calibrated(model)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise QuantizationError(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    chosen = _quantizers_of(model, layers)
    modules = {name: _module(model, name) for name in outputs}
    local, whole, done = {part: _Sums() for part in parts}, _Sums(), 0
    with torch.no_grad(), evaluating(model), quantizer_flags(named_quantizers(model).values(), _if_calib=False):
        for batch in batches:
            done += 1
            kept: dict[str, list[list[Tensor]]] = {name: [] for name in modules}
            with _float_network(model, chosen, local), _hooked(modules, partial(_keep, kept)):
                forward(model, batch)
            if modules:
                with _hooked(modules, partial(_compare, kept, whole)):
                    forward(model, batch)
            if after_batch is not None:
                after_batch(done, batch)
    return Measured({part: sums.noises(chosen) for part, sums in local.items()}, whole.noises(modules), done)


def noise_between(reference: Any, actual: Any) -> Noise:
    """Noise of `actual` against `reference`: tensors, sparse tensors, or nested lists and dictionaries of them."""
    sums = _Sums()
    for one, other in zip(tensors_of(reference), tensors_of(actual), strict=True):
        sums.add("", one, other)
    return sums.noises([""]).get("", Noise())


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output, in order: of sparse tensors the features."""
    if isinstance(output, SparseConvTensor):
        return [output.features]
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def output_module(model: nn.Module, path: str) -> str:
    """Name of the module that computes what the part of the network at `path` hands on.

    That is the part itself, or where it is a mere container, such as a ModuleDict, its last child.
    """
    module = _module(model, path)
    while type(module).forward is nn.Module.forward and len(module._modules):
        last, module = list(module._modules.items())[-1]
        path = f"{path}.{last}"
    return path


class _Sums:
    """Two float64 sums a name, kept where the tensors lie: nothing waits for the device before `noises`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, reference: Tensor, actual: Tensor) -> None:
        signal, noise = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (reference, actual - reference))
        squares = torch.stack([signal, noise]).square()
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares

    def noises(self, order: Iterable[str]) -> dict[str, Noise]:
        return {name: Noise(*self.sums[name].tolist()) for name in order if name in self.sums}


def _module(model: nn.Module, name: str) -> nn.Module:
    names = dict(unwrap(model).named_modules(remove_duplicate=False))
    if name not in names:
        raise no_match(name, names, "output")
    return names[name]


def _quantizers_of(model: nn.Module, names: Iterable[str] | None) -> dict[str, tuple[TensorQuantizer, ...]]:
    """The quantizers to turn on for each layer that is to be measured."""
    everyone = quantized_layers(model)
    if names is None:
        on = {name: tuple(q for q in layer.quantizers if not q._disabled) for name, layer in everyone.items()}
        return {name: quantizers for name, quantizers in on.items() if quantizers}
    names = list(names)
    for name in names:
        if name not in everyone:
            raise no_match(name, everyone, "layer")
        if any(quantizer.amax is None for quantizer in everyone[name].quantizers):
            raise QuantizationError(f"{name} has no amax: calibrate the model first")
    return {name: everyone[name].quantizers for name in names}


@contextmanager
def _float_network(
    model: nn.Module, chosen: Mapping[str, tuple[TensorQuantizer, ...]], local: Mapping[str, _Sums]
) -> Iterator[None]:
    """Let the network compute in floating point, and measure the `chosen` layers on the way."""
    layers = quantized_layers(model)
    with ExitStack() as stack:
        stack.enter_context(disable_quantization(unwrap(model)))
        for name, quantizers in chosen.items() if local else ():
            hook = partial(_measure_layer, name, quantizers, local)
            handle = layers[name].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _measure_layer(
    name: str,
    quantizers: Sequence[TensorQuantizer],
    local: Mapping[str, _Sums],
    layer: QuantLayer,
    inputs: tuple,
    keywords: dict,
    output: Any,
) -> None:
    """Forward hook: run `layer` again with its quantizers on, and add what that changes."""
    weights = getattr(layer, "_weight_quantizer", None)
    kinds = {
        "both": list(quantizers),
        "inputs": [q for q in quantizers if q is not weights],
        "weights": [q for q in quantizers if q is weights],
    }
    reference = tensors_of(output)
    for part, sums in local.items():
        if kinds[part]:
            with quantizer_flags(kinds[part], _disabled=False):
                quantised = tensors_of(layer.forward(*inputs, **keywords))
            for one, other in zip(reference, quantised, strict=True):
                sums.add(name, one, other)


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Callable[[str, list[Tensor]], None]) -> Iterator[None]:
    """Call `hook` with name and output tensors whenever one of `modules` has run."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def call(_: nn.Module, inputs: tuple, output: Any, name: str = name) -> None:
                hook(name, tensors_of(output))

            stack.callback(module.register_forward_hook(call).remove)
        yield


def _keep(kept: Mapping[str, list[list[Tensor]]], name: str, tensors: list[Tensor]) -> None:
    """Keep copies: a later module may write into its input in place."""
    kept[name].append([tensor.clone() for tensor in tensors])


def _compare(kept: Mapping[str, list[list[Tensor]]], sums: _Sums, name: str, tensors: list[Tensor]) -> None:
    """Compare with the first call that is still kept, and let go of it."""
    for one, other in zip(kept[name].pop(0), tensors, strict=True):
        sums.add(name, one, other)
