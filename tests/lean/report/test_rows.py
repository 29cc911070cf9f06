"""The layers of a model as rows."""

import math

import pytest

from lean.report.rows import branch_of, decibels
from lean.sqnr import Noise
from tests.lean.report.samples import REASON, layers


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    return {row["name"]: row for row in layers()}


def test_a_quantised_layer(rows):
    row = rows["encoders.camera.backbone.layer1.0.conv1"]
    assert (row["state"], row["why"], row["bits"], row["kind"]) == ("int8", "", 8, "QuantConv2d")
    assert row["shape"] == [4, 4, 3, 3]
    assert row["branch"] == "encoders.camera"
    assert row["amax"] > 0
    assert 0 < row["weight_amax"][0] <= row["weight_amax"][1]
    assert 20 < row["sqnr"] < 60
    assert row["shared_with"] == ["encoders.camera.backbone.layer1.0.add"]


def test_layers_that_share_a_scale_have_one_quantizer(rows):
    row = rows["encoders.camera.backbone.layer1.0.conv1"]
    other = rows["encoders.camera.backbone.layer1.0.add"]
    assert row["quantizer"] == other["quantizer"] == "encoders.camera.backbone.layer1.0.conv1._input_quantizer"
    assert other["shape"] is None


def test_why_layers_are_float(rows):
    assert rows["decoder.neck.deblocks.0.0"]["state"] == "disabled"
    assert rows["decoder.neck.deblocks.0.0"]["why"] == REASON
    left = rows["encoders.camera.vtransform.downsample.0"]
    assert (left["state"], left["why"], left["quantizer"]) == ("float", "the recipe leaves it in float", None)
    assert rows["head.0"]["why"] == "Conv1d has no INT8 form"
    assert rows["head.0"]["branch"] == "head"


def test_measures_stay_with_their_layer(rows):
    assert {name for name, row in rows.items() if row["macs"] is not None} == {"fuser.0"}
    assert {name for name, row in rows.items() if row["sqnr"] is not None} == {
        name for name, row in rows.items() if row["state"] == "int8"
    }


def test_no_error_and_no_number():
    assert decibels(Noise(1.0, 0.0)) == 200
    assert decibels(Noise(0.0, 1.0)) == -200
    assert decibels(Noise(math.nan, 1.0)) is None
    assert decibels(None) is None


def test_a_branch_is_not_found_by_part_of_a_word():
    assert branch_of("fuser2.0", ["fuser", "decoder"]) == "fuser2"
    assert branch_of("fuser.0", ["fuser", "decoder"]) == "fuser"
