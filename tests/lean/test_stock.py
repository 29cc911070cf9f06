"""The choice of amax against the reference's, and the histogram calibrator on awkward tensors."""

import json

import numpy as np
import pytest
import torch

from lean.errors import QuantizationError
from lean.stock import StockHistogram, stock_amax

ONE_SIZE = ("relu_one", "signed_one", "shrink", "heavy_tail", "constant")
GROWN = ("grow", "grow_tiny")


@pytest.fixture(scope="module")
def units(golden):
    return json.loads((golden / "quantizer_units.json").read_text()), np.load(golden / "quantizer_units.npz")


def unit_batches(sequence):
    """The reference's batches, as its README defines them."""
    kinds = {
        "relu": lambda r: np.maximum(r, 0),
        "exp3": lambda r: r**3,
        "zero": lambda r: r * 0,
        "const": lambda r: r * 0 + 1,
        "signed": lambda r: r,
    }
    for seed, kind, factor in sequence:
        values = kinds[kind](np.random.RandomState(seed).randn(20000)) * factor
        yield torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("case", [*ONE_SIZE, *GROWN, "all_zero", "grow_huge"])
def test_unit_histograms_give_the_reference_amax_exactly(units, case):
    table, arrays = units
    counts, edges = arrays[f"hist/{case}/counts"], arrays[f"hist/{case}/edges"]
    expected = {key[5:]: value for key, value in table["hist"][case].items() if key.startswith("amax_")}
    assert {"mse", "percentile99.99", "percentile99.9"} <= set(expected)
    for name, value in expected.items():
        method, _, percentile = name.partition("percentile")
        options = {"percentile": float(percentile)} if percentile else {}
        assert stock_amax(counts, edges, method or "percentile", **options) == np.float32(value), name


@pytest.mark.parametrize("case", [*ONE_SIZE, *GROWN])
def test_calibrator_collects_the_reference_histogram_and_amax(units, case):
    table, arrays = units
    calibrator = StockHistogram(8, None, False)
    for values in unit_batches(table["hist"][case]["sequence"]):
        calibrator.collect(values)
    np.testing.assert_array_equal(calibrator._calib_hist.numpy(), arrays[f"hist/{case}/counts"])
    np.testing.assert_allclose(calibrator._calib_bin_edges.numpy(), arrays[f"hist/{case}/edges"], rtol=1e-6, atol=1e-7)
    for method in ("mse", "entropy"):
        expected = table["hist"][case][f"amax_{method}"]
        assert calibrator.compute_amax(method).item() == pytest.approx(expected, rel=1e-6)


def reference_edges(bins: int, last: float, width: float) -> np.ndarray:
    """Bin edges as the reference's torch 1.10 rounded them: blocks of eight lanes, their base by fused multiply-add."""
    f32 = np.float32
    index = np.arange(bins + 1)
    block = index // 8 * 8
    lane = (index - block).astype(f32)

    def fused(a: np.float32, b: np.ndarray, c: np.ndarray | np.float32) -> np.ndarray:
        return (np.float64(a) * b.astype(np.float64) + np.asarray(c, np.float64)).astype(f32)

    if bins > 2048:  # torch.arange
        edges = fused(f32(width), lane, fused(f32(width), block, f32(0)))
        return np.where(index >= (bins + 1) // 8 * 8, index.astype(f32) * f32(width), edges)
    step, last = f32(f32(last) / f32(bins)), f32(last)  # torch.linspace, counted from the nearer end
    base = np.where(block < (bins + 1) // 2, fused(step, block, f32(0)), fused(-step, bins - block, last))
    edges = (base + (step * lane).astype(f32)).astype(f32)
    return np.where(index >= (bins + 1) // 8 * 8, fused(-step, bins - index, last), edges)


@pytest.mark.parametrize("name", ["ptq_reference", "ptq_reference_2frames"])
def test_model_histograms_give_the_reference_amax_exactly(golden, name):
    arrays = np.load(golden / f"{name}.npz")
    widths = {q["name"]: q.get("hist") for q in json.loads((golden / "ptq_reference.json").read_text())["quantizers"]}
    checked = 0
    for quantizer in json.loads((golden / f"{name}.json").read_text())["quantizers"]:
        key = f"hist/{quantizer['name']}"
        if key not in arrays:
            continue
        first = widths[quantizer["name"]]
        last = quantizer.get("last_edge", first["last_edge"])
        edges = reference_edges(len(arrays[key]), last, first["first_width"])
        assert stock_amax(arrays[key], edges) == np.float32(quantizer["amax"]), quantizer["name"]
        checked += 1
    assert checked == 105


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile"])
def test_counts_beyond_float32_and_int32_are_used_as_they_are(units, method):
    table, arrays = units
    for case in ("relu_one", "heavy_tail"):
        counts = arrays[f"hist/{case}/counts"].astype(np.int64) * 1_000_001
        assert counts.max() > 2**31
        expected = table["hist"][case]["amax_percentile99.99" if method == "percentile" else f"amax_{method}"]
        assert stock_amax(counts, arrays[f"hist/{case}/edges"], method) == np.float32(expected)


def test_max_is_the_largest_value_of_a_single_batch():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    calibrator = StockHistogram(8, None, False)
    calibrator.collect(values)
    assert calibrator.compute_amax("max").item() == pytest.approx(values.abs().max().item(), rel=1e-6)


def test_leading_zeros_and_empty_tensors_are_ignored():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    plain, awkward = StockHistogram(8, None, False), StockHistogram(8, None, False)
    plain.collect(values)
    for tensor in (torch.zeros(10), torch.empty(0, 4), values):
        awkward.collect(tensor)
    assert awkward.compute_amax("mse") == plain.compute_amax("mse")
    assert StockHistogram(8, None, False).compute_amax("mse") is None


def test_reset_forgets_the_grown_histogram():
    calibrator = StockHistogram(8, None, False)
    for factor in (1, 50):
        calibrator.collect(torch.rand(1000) * factor)
    calibrator.reset()
    calibrator.collect(torch.rand(1000))
    assert len(calibrator._calib_hist) == 2048


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_tensors_are_counted_and_left_out(value):
    calibrator = StockHistogram(8, None, False)
    calibrator.collect(torch.tensor([1.0, value]))
    calibrator.collect(torch.tensor([1.0, 2.0]))
    assert calibrator.nonfinite == 1
    assert calibrator.compute_amax("max").item() == 2.0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [("median", {}, "must be one of mse"), ("percentile", {"percentile": 101}, "between 0 and 100")],
)
def test_bad_requests_are_named(method, options, message):
    with pytest.raises(QuantizationError, match=message):
        stock_amax(np.ones(2048), np.linspace(0, 1, 2049, dtype=np.float32), method, **options)


def test_edges_must_fit_the_counts():
    with pytest.raises(QuantizationError, match="2048 counts and 2048 edges"):
        stock_amax(np.ones(2048), np.ones(2048, np.float32))
