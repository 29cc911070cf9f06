"""Thinned-out statistics against the values that they were made from."""

import numpy as np
import pytest

from lean.histogram import Histogram
from lean.report.charts import BINS, CANDIDATES, OCTAVES, chart

VALUES = np.random.default_rng(0).standard_t(4, 40000).astype(np.float32)
VALUES[:5000] = 0


def of(amax: float) -> dict:
    return chart(Histogram.from_values(VALUES), amax)


def test_every_value_is_counted_once():
    data = of(3.0)
    assert len(data["counts"]) == BINS
    assert data["total"] == len(VALUES)
    assert data["zeros"] == 5000
    assert sum(data["counts"]) + data["below"] + data["zeros"] == pytest.approx(len(VALUES), rel=1e-3)


def test_bins_hold_the_values_between_their_edges():
    data = of(3.0)
    edges = data["max"] * 2.0 ** (np.arange(-BINS, 1) * OCTAVES / BINS)
    expected = np.histogram(np.abs(VALUES), edges)[0]
    # 16 bins of the statistics make one of the chart, so that its edges may cut one in two
    np.testing.assert_allclose(data["counts"], expected, atol=0.15 * expected.max(), rtol=0.05)
    assert data["counts"][-1] > 0


def test_what_an_amax_does_to_the_values():
    data, size = of(3.0), np.abs(VALUES)
    assert data["clipped"] == pytest.approx((size > 3).mean(), rel=0.02)
    assert data["underflow"] == pytest.approx(((size < 1.5 / 127) & (size > 0)).mean(), rel=0.05)
    steps = np.clip(np.round(VALUES / (3 / 127)), -127, 127) * (3 / 127)
    assert data["error"] == pytest.approx(((steps - VALUES) ** 2).sum() / (VALUES.astype(float) ** 2).sum(), rel=0.01)


def test_nothing_is_clipped_at_the_maximum():
    data = of(float(np.abs(VALUES).max()))
    assert data["clipped"] == 0
    assert data["error"] == pytest.approx(data["errors"][0], rel=1e-3)


def test_the_curve_of_errors_has_its_least_where_mse_is_least():
    data = of(3.0)
    assert len(data["errors"]) == CANDIDATES
    amax = data["max"] * 2.0 ** (-np.arange(CANDIDATES) / 8)
    exact = []
    for one in amax:
        steps = np.clip(np.round(VALUES / (one / 127)), -127, 127) * (one / 127)
        exact.append(((steps - VALUES) ** 2).sum() / (VALUES.astype(float) ** 2).sum())
    np.testing.assert_allclose(data["errors"], exact, rtol=0.05)
    assert np.argmin(data["errors"]) == np.argmin(exact)


def test_an_input_of_zeros_has_no_chart():
    data = chart(Histogram.from_values(np.zeros(10)), None)
    assert (data["total"], data["zeros"], data["counts"], data["errors"]) == (10, 10, [], [])
