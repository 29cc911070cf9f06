"""Evaluate the `${…}` expressions of a config against the config's own keys, without running code."""

import ast
import difflib
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bevfusion.errors import InputError

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}


def evaluate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy `config` with every value of the form `${expression}` replaced by what it stands for.

    An expression is written in Python: literals, names of top-level keys, ``a.b``, ``a["b"]``, ``a[0]``, ``a[:2]``,
    lists, and the operators + - * / // % and not. What it stands for may hold expressions in turn.

    Raises:
        InputError: an expression is malformed, names no key, refers to itself, or asks for anything else (a call, say).
    """
    evaluator = _Evaluator(config)

    def convert(leaf: Any, key: str) -> Any:
        try:
            return evaluator.expand(leaf)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        except RecursionError:
            raise InputError(f"{key}: {leaf!r} is nested too deeply") from None

    return _map_leaves(config, convert)


def _map_leaves(value: Any, convert: Callable[[Any, str], Any], key: str = "") -> Any:
    """Copy nested mappings and lists, passing every leaf and its key through `convert`."""
    if isinstance(value, Mapping):
        return {name: _map_leaves(item, convert, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_leaves(item, convert, f"{key}[{i}]") for i, item in enumerate(value)]
    return convert(value, key)


class _Evaluator:
    """Follows expressions only where they are met, so that keys may refer forwards and to their siblings."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._pending: list[str] = []

    def expand(self, leaf: Any) -> Any:
        """Return what `leaf` stands for, down to the innermost expression."""
        if not _is_expression(leaf):
            return leaf
        with self._entered(leaf):
            return _map_leaves(self._node(_parse(leaf)), lambda inner, _: self.expand(inner))

    @contextmanager
    def _entered(self, text: str) -> Iterator[None]:
        # Equal texts stand for equal values, so meeting a text while it is being evaluated is a cycle.
        if text in self._pending:
            raise InputError(f"{text!r} refers to itself: " + " -> ".join([*self._pending, text]))
        self._pending.append(text)
        try:
            yield
        finally:
            self._pending.pop()

    def _follow(self, value: Any) -> Any:
        """Return the value behind a reference; a container keeps the expressions inside it."""
        if not _is_expression(value):
            return value
        with self._entered(value):
            return self._node(_parse(value))

    def _node(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str()):
                return node.value
            case ast.Name():
                return self._item(self._config, node.id, "config")
            case ast.Attribute():
                return self._item(self._node(node.value), node.attr, ast.unparse(node.value))
            case ast.Subscript():
                return self._item(self._node(node.value), self._index(node.slice), ast.unparse(node.value))
            case ast.List() | ast.Tuple():
                return [self._node(element) for element in node.elts]
            case ast.BinOp(op=op) if type(op) in _OPERATORS:
                return _apply(node, self._node(node.left), self._node(node.right))
            case ast.UnaryOp(op=op) if type(op) in _OPERATORS:
                return _apply(node, self._node(node.operand))
        raise InputError(
            f"{ast.unparse(node)!r} is not allowed: use keys, literals, indices, lists and + - * / // % only"
        )

    def _index(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Slice):
            return slice(*(part and self._node(part) for part in (node.lower, node.upper, node.step)))
        return self._node(node)

    def _item(self, container: Any, index: Any, name: str) -> Any:
        try:
            value = container[index]
        except KeyError:
            near = ", ".join(difflib.get_close_matches(str(index), map(str, container), 3)) or "none"
            raise InputError(f"{name} has no key {index!r}; nearest: {near}") from None
        except (TypeError, IndexError) as error:
            raise InputError(f"{name} has no item {index!r}: {error}") from None
        return self._follow(value)


def _is_expression(value: Any) -> bool:
    """Whether `value` is an expression.

    Raises:
        InputError: it holds one amid other text, which the format does not know and would keep as it stands.
    """
    if not isinstance(value, str) or "${" not in value:
        return False
    if not (value.startswith("${") and value.endswith("}")):
        raise InputError(f"{value!r}: an expression must be the whole value; join texts as ${{name + 'text'}}")
    return True


def _parse(text: str) -> ast.AST:
    try:
        return ast.parse(text[2:-1].strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError) as error:
        raise InputError(f"{text!r} is no valid expression: {error}") from None


def _apply(node: ast.BinOp | ast.UnaryOp, *operands: Any) -> Any:
    try:
        return _OPERATORS[type(node.op)](*operands)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{ast.unparse(node)!r}: {error}") from None
