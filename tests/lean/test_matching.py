"""Glob patterns over names, and the answer to one that fits nothing."""

import pytest

from lean.errors import QuantizationError
from lean.matching import matches, select

NAMES = ["encoders.lidar.backbone", "encoders.lidar.backbone.layer1", "encoders.lidar.backbone.layer10", "decoder"]


def test_whole_names_match_never_parts():
    assert matches("a.layer1", ["a.layer1"])
    assert not matches("a.layer10", ["a.layer1"])
    assert not matches("b.a.layer1", ["a.layer1"])
    assert matches("a.b.c", ["a.*"])
    assert not matches("A.b", ["a.*"])


def test_select_keeps_the_order_of_the_names():
    assert select(["decoder", "*.layer1"], NAMES, "rule") == ["encoders.lidar.backbone.layer1", "decoder"]


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("encoders.lidar.bacbone.*", "encoders.lidar.backbone"),
        ("encoders.lidr", "encoders.lidar"),
        ("decodr", "decoder"),
    ],
)
def test_a_pattern_that_fits_nothing_is_answered_with_the_nearest_module(pattern, nearest):
    with pytest.raises(QuantizationError) as caught:
        select([pattern], NAMES, "rule")
    assert str(caught.value) == f"rule {pattern!r} matched no module; nearest: {nearest!r}"


def test_every_pattern_must_fit():
    with pytest.raises(QuantizationError, match="'x'"):
        select(["decoder", "x"], NAMES, "--disable")
