"""What is quantised, as validated data."""

import dataclasses
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from lean.amax import METHODS
from lean.errors import QuantizationError


class Data:
    """Base of the recipe's dataclasses: to and from plain dictionaries, unknown keys refused."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Self:
        """Build from plain dictionaries, lists and scalars, as YAML or JSON give them.

        Raises:
            QuantizationError: a key is unknown or missing, or a value is out of range; the message says where.
        """
        if not isinstance(data, Mapping):
            raise QuantizationError(f"{where}: expected a mapping, got {type(data).__name__}")
        hints = get_type_hints(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise QuantizationError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(hints)}")
        values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise QuantizationError(f"{where}: {str(error).partition('() ')[2] or error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, tuples and scalars that `from_dict` reads."""
        return dataclasses.asdict(self)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise QuantizationError(f"{where}: expected a list, got {type(value).__name__}")
        return tuple(_convert(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is UnionType:  # `X | None`
        return None if value is None else _convert(get_args(hint)[0], value, where)
    if isinstance(hint, type) and issubclass(hint, Data):
        return hint.from_dict(value, where)
    if type(value) is not hint:
        raise QuantizationError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _one_of(value: Any, allowed: tuple, what: str) -> None:
    if value not in allowed:
        raise QuantizationError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@dataclass(frozen=True)
class QuantizerSpec(Data):
    """How one kind of tensor is quantised: symmetric, `num_bits` wide, amax from `calibrator` statistics."""

    num_bits: int = 8
    calibrator: str = "histogram"
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self):
        _one_of(self.num_bits, tuple(range(2, 17)), "num_bits")
        _one_of(self.calibrator, ("histogram", "max"), "calibrator")


@dataclass(frozen=True)
class LayerRule(Data):
    """Quantise every layer whose name, relative to the branch, fits the glob `pattern`; the last fitting rule counts.

    Attributes:
        inputs: which inputs of a join pass the quantizer: `all`, or `second` (of a residual add, the identity).
        optional: whether the rule may fit no layer.
    """

    pattern: str
    inputs: str = "all"
    optional: bool = False

    def __post_init__(self):
        _one_of(self.inputs, ("all", "second"), f"inputs of rule {self.pattern!r}")


@dataclass(frozen=True)
class ShareRule(Data):
    """Layers whose inputs are one tensor, or must have one scale, share one input quantizer.

    Attributes:
        leader: name of the layer whose quantizer is kept; `{word}` stands for part of a name between dots.
        followers: names that take it over, with the leader's words filled in.
        unless: globs, words filled in; the rule does not apply where one fits a module.
        optional: whether leader or followers may be missing.
    """

    leader: str
    followers: tuple[str, ...]
    unless: tuple[str, ...] = ()
    optional: bool = False

    def __post_init__(self):
        known = _words(self.leader)
        for template in (*self.followers, *self.unless):
            if not _words(template) <= known:
                raise QuantizationError(f"share rule {self.leader!r}: {template!r} uses a word the leader has not")


def _words(template: str) -> set[str]:
    return {word for _, word, _, _ in string.Formatter().parse(template) if word is not None}


@dataclass(frozen=True)
class BranchRecipe(Data):
    """Rules for the module at `path`; all names in them are relative to it.

    Attributes:
        keep_float: globs of layers left out although a rule fits them.
    """

    path: str
    quantize: tuple[LayerRule, ...]
    share: tuple[ShareRule, ...] = ()
    keep_float: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.quantize:
            raise QuantizationError(f"branch {self.path!r} has no rule in 'quantize'; leave the branch out instead")


@dataclass(frozen=True)
class MethodRule(Data):
    """Choose amax by `method` in the input quantizers whose names fit the glob `pattern`; the last fitting counts."""

    pattern: str
    method: str

    def __post_init__(self):
        _one_of(self.method, METHODS, f"method of {self.pattern!r}")


@dataclass(frozen=True)
class Recipe(Data):
    """Everything that decides which layer runs in INT8 and with what.

    Attributes:
        methods: how amax is chosen where it isn't `mse`.
        disable: globs of layers, relative to the model, that are calibrated and then left in floating point.
        transposed_axis: axis of a transposed convolution's weight that has one scale each: 0 (input channels, as
            pytorch-quantization does) or 1 (output channels).
    """

    branches: tuple[BranchRecipe, ...]
    disable: tuple[str, ...] = ()
    methods: tuple[MethodRule, ...] = ()
    activation: QuantizerSpec = field(default_factory=QuantizerSpec)
    weight: QuantizerSpec = field(default_factory=lambda: QuantizerSpec(calibrator="max"))
    transposed_axis: int = 0

    def __post_init__(self):
        _one_of(self.transposed_axis, (0, 1), "transposed_axis")
        _one_of(self.weight.calibrator, ("max",), "calibrator of weights")
        paths = [branch.path for branch in self.branches]
        if len(set(paths)) != len(paths):
            raise QuantizationError("recipe: two branches have the same path; merge their rules")

    def method_table(self) -> dict[str, str]:
        """Glob over quantizer names -> method; every name fits one."""
        return {"*": METHODS[0]} | {rule.pattern: rule.method for rule in self.methods}
