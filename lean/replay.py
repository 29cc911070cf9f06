"""Running a network again and again with a few layers changed, without computing again what can't have changed.

One forward is recorded: of every module, the tensors that went in and what came out. In a replay a module that holds no
changed layer, and gets the very tensors that it got in the recorded forward, hands out what it gave then. As it hands
out the recorded tensors themselves, this goes on from module to module up to the first changed layer, and through every
branch that doesn't depend on it: nothing needs to know how the network is built. Results equal those of a whole forward
bit for bit where a forward repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pytorch_quantization.nn import TensorQuantizer
from spconv.pytorch import SparseModule
from torch import Tensor, nn

from lean.calibrate import evaluating
from lean.layers import QuantLayer
from lean.matching import no_match
from lean.switches import quantized_layers, unwrap
from lean.values import copied, identity, tensors_in
from lean.walker import replace_modules

CONTAINERS = (nn.Sequential,)  # the only modules of torch.nn whose children are worth a look


class Tape:
    """What `replaying` yields: records one forward, and replays it.

    Attributes:
        outputs: the outputs of the watched modules that computed them in the last forward, by name.
    """

    def __init__(self, modules: Mapping[str, Replayed], watched: Iterable[str], around: Mapping[str, list[Replayed]]):
        self._modules, self._around = modules, around
        self.outputs: dict[str, Any] = {}
        for name in watched:
            if name not in modules:
                raise no_match(name, modules, "output")
            modules[name].watch(name, self.outputs)

    def record(self, run: Callable[[], Any]) -> Any:
        """Return what `run` returns, and keep what every module got and gave in it instead of what was kept before."""
        self.forget()
        self.outputs.clear()
        for module in self._modules.values():
            module.mode = "record"
        try:
            return run()
        finally:
            for module in self._modules.values():
                module.mode = "run"
                module.drop_overwritten()

    def replay(self, run: Callable[[], Any], changed: Iterable[str]) -> Any:
        """Return what `run` returns now that the layers `changed` compute something else than in the recorded forward.

        `outputs` then lacks the modules that gave what was recorded.
        """
        self.outputs.clear()
        changed = list(changed)
        for module in self._modules.values():
            module.mode = "replay"
        for name in changed:
            for module in self._around[name]:
                module.mode = "run"
        try:
            return run()
        finally:
            for module in self._modules.values():
                module.mode = "run"

    def forget(self) -> None:
        """Let go of the recorded forward."""
        for module in self._modules.values():
            module.kept.clear()


class Replayed(nn.Module):
    """Stands in for `inner`; what it isn't asked to do itself, `inner` does.

    Attributes:
        mode: `run` passes on, `record` keeps, `replay` hands out where it can.
        kept: for what went in, see `identity`: the tensors themselves, so that their memory is not used again, and
            what came out, with the versions of its tensors.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.mode = "run"
        self.kept: dict[tuple, tuple[Any, Any, list[int]]] = {}
        self._watched: tuple[str, dict[str, Any]] | None = None
        self.train(inner.training)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Return what `inner` returns for these arguments, or has returned."""
        key = identity((args, keywords)) if self.mode != "run" else None
        if self.mode == "replay" and key in self.kept:
            return copied(self.kept[key][1])
        output = self.inner(*args, **keywords)
        if self.mode == "record" and key is not None:
            self.kept[key] = (args, keywords), copied(output), [tensor._version for tensor in tensors_in(output)]
        if self._watched is not None:
            name, outputs = self._watched
            outputs[name] = output
        return output

    def watch(self, name: str, outputs: dict[str, Any]) -> None:
        """Put every output into `outputs` under `name`."""
        self._watched = name, outputs

    def drop_overwritten(self) -> None:
        """Forget outputs that something has written into since."""
        fresh = {
            key: held
            for key, held in self.kept.items()
            if [tensor._version for tensor in tensors_in(held[1])] == held[2]
        }
        self.kept = fresh

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __getitem__(self, index: Any) -> Any:
        return self.inner[index]


class ReplayedSparse(Replayed, SparseModule):
    """The same for a module that spconv hands whole sparse tensors."""

    def __init__(self, inner: nn.Module):
        Replayed.__init__(self, inner)


class HeldWeight(nn.Module):
    """Stands in for a weight quantizer: quantises a weight once, as weights don't change between forwards."""

    def __init__(self, inner: TensorQuantizer):
        super().__init__()
        self.inner = inner
        self._held: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight`, fake-quantised if the quantizer is on."""
        if self.inner._disabled:
            return weight
        if self._held is None:
            self._held = self.inner(weight)
        return self._held

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@contextmanager
def replaying(model: nn.Module, watched: Iterable[str] = ()) -> Iterator[Tape]:
    """Let forwards of `model` be recorded and replayed within a `with` block, in evaluation mode without gradients.

    Within the block the names of modules are others, weights and amax must not change, and no module works in place.
    Afterwards every module, flag and hook is where it was.

    Args:
        watched: names of modules whose outputs are wanted; see `lean.sqnr.output_module`.

    Raises:
        QuantizationError: `watched` names a module that is unknown, or that is not recorded.
    """
    model = unwrap(model)
    layers = quantized_layers(model)
    names = _names(model)
    chosen = {module: name for name, module in _worth_keeping(model)}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(_out_of_place(model))
        weights = {getattr(layer, "_weight_quantizer", None) for layer in layers.values()}
        stack.enter_context(_swapped(model, lambda m: HeldWeight(m) if m in weights else None))
        wrapped = stack.enter_context(_swapped(model, lambda m: _wrap(m) if m in chosen else None))
        modules = {chosen[inner]: wrapper for inner, wrapper in wrapped.items()}
        around = {name: _around(layer, names, wrapped) for name, layer in layers.items()}
        tape = Tape(modules, watched, around)
        try:
            yield tape
        finally:
            tape.forget()


def _worth_keeping(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that something calls, by name: not what lies inside a quantised layer or a layer of torch's own."""
    leaves: set[str] = set()
    for name, module in model.named_modules():
        if any(parent in leaves for parent in _upwards(name)[1:]):
            continue
        own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, CONTAINERS)
        called = type(module).forward is not nn.Module.forward
        if called and (own or isinstance(module, QuantLayer)):
            leaves.add(name)
        if name and called and not isinstance(module, nn.Identity):
            yield name, module


def _upwards(name: str) -> list[str]:
    """A dotted name and every parent's, the root's left out."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by every name that it has."""
    return dict(model.named_modules(remove_duplicate=False))


def _around(layer: nn.Module, names: Mapping[str, nn.Module], wrapped: Mapping[nn.Module, Replayed]) -> list[Replayed]:
    """What stands in for a layer and for every module around it, by all its names."""
    paths = {path for name, module in names.items() if module is layer for path in _upwards(name)}
    return [wrapped[names[path]] for path in paths if names[path] in wrapped]


def _wrap(module: nn.Module) -> Replayed:
    return ReplayedSparse(module) if isinstance(module, SparseModule) else Replayed(module)


@contextmanager
def _swapped(
    model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]
) -> Iterator[dict[nn.Module, nn.Module]]:
    """Put what `convert` returns, with the module as its `inner`, in the module's place; yields new by old."""
    new = replace_modules(model, lambda _, module: convert(module))
    try:
        yield {module.inner: module for module in new.values()}
    finally:
        back = set(new.values())
        replace_modules(model, lambda _, module: module.inner if module in back else None)


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Keep modules with an `inplace` flag from writing into their input."""
    modules = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    try:
        for module in modules:
            module.inplace = False
        yield
    finally:
        for module in modules:
            module.inplace = True
