"""The search for the layers to leave in floating point, on drops and costs that are known."""

import itertools

import pytest

from lean.mixed import Candidate, rank, search

SIZES = {"a": 8.0, "b": 4.0, "c": 2.0, "d": 1.0, "e": 1.0}
ORDER = [Candidate((name,), size) for name, size in SIZES.items()]


def names(candidates) -> str:
    return "".join(name for candidate in candidates for name in candidate.layers)


def remaining(chosen) -> float:
    """Drop of a model in which every candidate causes its own part."""
    return sum(SIZES.values()) - sum(candidate.benefit for candidate in chosen)


@pytest.mark.parametrize(
    ("target", "expected", "drop"),
    [(16.0, "", 16.0), (8.0, "a", 8.0), (4.5, "ab", 4.0), (1.5, "abcd", 1.0), (0.0, "abcde", 0.0)],
)
def test_as_few_as_meet_the_target(target, expected, drop):
    choice = search(ORDER, remaining, target)
    assert (names(choice.best.chosen), choice.best.drop, choice.met) == (expected, drop, True)
    assert "".join(choice.layers) == expected
    assert choice.attempts[0].chosen == ()


def test_an_unreachable_target_says_how_far_it_came():
    choice = search(ORDER, lambda chosen: 3.0 + remaining(chosen), 1.0)
    assert not choice.met
    assert (names(choice.best.chosen), choice.best.drop) == ("abcde", 3.0)
    nothing = search([], lambda chosen: 3.0, 1.0)
    assert (nothing.layers, nothing.best.drop, nothing.met) == ((), 3.0, False)


def test_of_equal_drops_the_fewest_candidates_are_kept():
    choice = search(ORDER, lambda chosen: 3.0, 1.0)
    assert (choice.layers, choice.met) == ((), False)


def test_candidates_that_turn_out_useless_are_left_out():
    def only_c(chosen) -> float:
        return 0.0 if "c" in names(chosen) else 5.0

    choice = search(ORDER, only_c, 1.0)
    assert names(choice.best.chosen) == "c"
    assert names(search(ORDER, only_c, 1.0, prune=0).best.chosen) == "abc"


def test_few_measurements_are_made():
    many = [Candidate((f"l{i}",), 1.0) for i in range(100)]
    choice = search(many, lambda chosen: 100.0 - len(chosen), 63.0)
    assert len(choice.best.chosen) == 37
    assert len(choice.attempts) < 25


def test_benefit_per_time_decides_the_order():
    costs = {"a": 8.0, "b": 1.0, "c": 1.0}
    candidates = [Candidate(("a",), 8.0), Candidate(("b",), 4.0), Candidate(("c",), 2.0), Candidate(("d",), 0.0)]
    order = rank(candidates, [*costs, "d"], lambda int8: -sum(costs.get(name, 1.0) for name in int8))
    assert names(order) == "bca"  # d brings nothing


def test_time_is_that_beside_those_already_chosen():
    def time(int8) -> float:  # a chain a-b-c: every change of precision along it costs 10
        chain = [name in int8 for name in "abc"]
        return chain.count(False) + 10 * sum(x != y for x, y in itertools.pairwise(chain))

    order = rank(
        [Candidate((name,), benefit) for name, benefit in zip("abc", (5.0, 0.6, 4.0), strict=True)], "abc", time
    )
    assert names(order) == "abc"  # alone c is far better than b; beside a, b comes for nearly nothing, and then c does


def test_the_budget_leaves_out_what_is_too_large():
    order = rank(ORDER, list(SIZES), lambda int8: -sum(SIZES[name] for name in int8), lambda int8: "a" in int8)
    assert names(order) == "bcde"
