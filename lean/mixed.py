"""Choosing which layers to leave in floating point: greedy by benefit per cost, judged by measurement."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

PRUNE = 8  # candidates at most whose removal is tried at the end


@dataclass(frozen=True)
class Candidate:
    """Layers that go to floating point together, and what that is expected to bring.

    Attributes:
        layers: their names; a group that shares a scale is one candidate.
        benefit: not negative; in any unit, the same for all candidates, that adds up over them.
    """

    layers: tuple[str, ...]
    benefit: float


@dataclass(frozen=True)
class Attempt:
    """The candidates that were in floating point in one measurement, and the drop measured."""

    chosen: tuple[Candidate, ...]
    drop: float


@dataclass(frozen=True)
class Choice:
    """Where a search ended.

    Attributes:
        best: the attempt that meets the target with least, or if none does, the one with the least drop.
        met: whether it meets the target.
        attempts: every measurement, in order; the first is of no candidate.
    """

    best: Attempt
    met: bool
    attempts: tuple[Attempt, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers to leave in floating point."""
        return tuple(name for candidate in self.best.chosen for name in candidate.layers)


def rank(
    candidates: Iterable[Candidate],
    int8: Collection[str],
    time: Callable[[Collection[str]], float],
    allowed: Callable[[Collection[str]], bool] = lambda int8: True,
) -> list[Candidate]:
    """Order candidates by benefit per time lost, each given that those before it are in floating point already.

    Args:
        int8: names of all layers that are in INT8 so far.
        time: of a frame, by the layers that stay in INT8.
        allowed: whether these layers in INT8 are enough; a candidate that would leave too few is left out.

    A candidate that costs no time, as one between two floating-point layers may, comes before all that do.
    """
    left = [candidate for candidate in candidates if candidate.benefit > 0]
    remaining, order = set(int8), []
    while left:
        before = time(remaining)
        ratios = {}
        for candidate in left:
            after = remaining.difference(candidate.layers)
            if allowed(after):
                lost = time(after) - before
                ratios[candidate] = (lost <= 0, candidate.benefit / lost if lost > 0 else candidate.benefit)
        if not ratios:
            break
        best = max(ratios, key=ratios.get)
        order.append(best)
        left.remove(best)
        remaining.difference_update(best.layers)
    return order


def search(
    order: Sequence[Candidate],
    measure: Callable[[tuple[Candidate, ...]], float],
    max_drop: float,
    prune: int = PRUNE,
) -> Choice:
    """Find the fewest of the first candidates that meet the target, then leave out those it is met without.

    The number of measurements grows with the logarithm of how many are needed: the prefix is doubled until the target
    is met, then halved between the last two. Measurements are taken to fall with every candidate; where they don't, as
    noisy ones may, the result still meets the target, but may hold more than it needs.

    Args:
        order: of `rank`.
        measure: drop with these candidates in floating point.
        max_drop: the target.
        prune: how many candidates are tried to be left out, the last and so least useful ones first.
    """
    attempts: list[Attempt] = []

    def meets(chosen: Sequence[Candidate]) -> bool:
        attempts.append(Attempt(tuple(chosen), measure(tuple(chosen))))
        return attempts[-1].drop <= max_drop

    short, long = -1, 0
    while not meets(order[:long]):
        if long == len(order):
            return Choice(min(attempts, key=lambda one: (one.drop, len(one.chosen))), False, tuple(attempts))
        short, long = long, min(max(2 * long, 1), len(order))
    while long - short > 1:
        middle = (short + long) // 2
        if meets(order[:middle]):
            long = middle
        else:
            short = middle
    chosen = list(order[:long])
    for candidate in reversed(chosen[:-1][-prune:] if prune else []):
        fewer = [other for other in chosen if other is not candidate]
        if meets(fewer):
            chosen = fewer
    best = next(one for one in reversed(attempts) if one.chosen == tuple(chosen))
    return Choice(best, True, tuple(attempts))
