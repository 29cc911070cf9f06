"""The one matcher: glob patterns over dotted module names."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from lean.errors import QuantizationError


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether the whole of `name` fits one of the glob `patterns`; `*` crosses dots."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def select(patterns: Iterable[str], names: Iterable[str], what: str) -> list[str]:
    """Return the `names` that fit any pattern, in their order.

    Args:
        patterns: globs, each of which must fit at least one name.
        names: dotted module names.
        what: what the patterns are, for the message ("rule", "--disable").

    Raises:
        QuantizationError: a pattern fits no name; the message gives the nearest one.
    """
    patterns, names = list(patterns), list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise no_match(pattern, names, what)
    return [name for name in names if matches(name, patterns)]


def no_match(pattern: str, names: Iterable[str], what: str) -> QuantizationError:
    """Build the error for a pattern that fits none of `names`."""
    literal = pattern.rstrip("*").rstrip(".")
    near = difflib.get_close_matches(literal, _with_parents(names), n=1, cutoff=0.0)
    hint = f"nearest: {near[0]!r}" if near else "there are no modules to match"
    return QuantizationError(f"{what} {pattern!r} matched no module; {hint}")


def _with_parents(names: Iterable[str]) -> list[str]:
    """Names and every dotted prefix of them, so that a misspelt parent is answered with a parent."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        found.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    return list(found)
