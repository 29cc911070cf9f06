"""Calibration: how many batches run, what they leave, and what is refused."""

import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lean import quantize
from lean.amax import METHODS, choose_amax
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights, check_calibrated, observe, reset_statistics, run_detector
from lean.errors import QuantizationError
from lean.fold import fold_dense, fold_sparse
from lean.histogram import Histogram
from lean.insert import insert_quantizers
from lean.status import layer_status, quantizer_table
from lean.stock import stock_amax
from lean.switches import disable_quantization, named_quantizers, quantized_layers
from lean.weights import weight_amax
from tests.lean.tiny import TinyFusion, batch, relative_error, run


@pytest.fixture
def model():
    model = TinyFusion()
    insert_quantizers(model, default_recipe(model))
    fold_dense(model)
    fold_sparse(model.encoders["lidar"]["backbone"])
    return model


class Counted:
    """Batches that know how many of them were taken."""

    def __init__(self, available: int):
        self.available, self.taken = available, 0

    def __iter__(self):
        for index in range(self.available):
            self.taken += 1
            yield batch(index % 3)


class CountedSized(Counted):
    """The same with a length, as a data loader has one."""

    def __len__(self) -> int:
        return self.available


def calibrate(model, batches, number=1, **options) -> int:
    return quantize.calibrate_model(model, batches, "cpu", run, number, **options)


@pytest.mark.parametrize(("wanted", "available", "runs"), [(1, 1, 1), (1, 5, 1), (2, 5, 2), (5, 5, 5), (300, 5, 5)])
def test_exactly_as_many_batches_run_as_are_asked_for(model, wanted, available, runs, caplog):
    batches, forwards = CountedSized(available), []
    with caplog.at_level(logging.WARNING):
        done = observe(model, batches, wanted, lambda m, b: forwards.append(run(m, b)))
    assert (done, batches.taken, len(forwards)) == (runs, runs, runs)
    assert ("the data loader has no more (300 were asked for)" in caplog.text) == (wanted > available)


def test_after_it_the_model_quantises_with_positive_amax(model):
    with disable_quantization(model):
        expected = run(model, batch(0))
    assert calibrate(model, [batch(0), batch(1)], 2) == 2
    check_calibrated(model)
    assert 1e-5 < relative_error(run(model, batch(0)), expected) < 0.1
    for name, quantizer in named_quantizers(model).items():
        assert torch.isfinite(quantizer.amax).all(), name
        assert (quantizer.amax > 0).all(), name


def test_the_model_is_observed_in_floating_point_and_in_evaluation_mode(model):
    with disable_quantization(model):
        expected = run(model, batch(0))
    seen = []
    model.train()
    model.fuser.eval()
    calibrate(model, [batch(0)])
    observe(model, [batch(0)], 1, lambda m, b: seen.append(run(m, b)))
    assert torch.equal(seen[0], expected)
    assert model.training
    assert model.decoder.training
    assert not model.fuser.training
    quantizers = named_quantizers(model).values()
    assert all(quantizer._if_quant and not quantizer._if_calib for quantizer in quantizers)


def test_weights_are_scaled_by_their_largest_value_per_output_channel(model):
    calibrate_weights(model)
    for name, layer in quantized_layers(model).items():
        if hasattr(layer, "_weight_quantizer"):
            amax = layer._weight_quantizer.amax
            by_channel = layer.weight.detach().abs().flatten(1).amax(1)
            torch.testing.assert_close(amax.flatten(), by_channel, rtol=0, atol=0, msg=name)
            assert amax.shape == (len(by_channel), *[1] * (layer.weight.dim() - 1))


def test_a_channel_of_zeros_gets_a_usable_scale(model):
    conv = model.decoder.backbone.blocks[0][0]
    with torch.no_grad():
        conv.weight[2] = 0
    calibrate_weights(model)
    amax = conv._weight_quantizer.amax.flatten()
    assert amax[2] == amax.max()
    assert (conv._weight_quantizer(conv.weight)[2] == 0).all()


def test_a_second_calibration_starts_from_nothing(model):
    calibrate(model, [batch(0)])
    first = {name: q.amax.clone() for name, q in named_quantizers(model).items()}
    calibrate(model, [batch(1), batch(2)], 2)
    assert any(not torch.equal(q.amax, first[name]) for name, q in named_quantizers(model).items())
    calibrate(model, [batch(0)])
    assert all(torch.equal(q.amax, first[name]) for name, q in named_quantizers(model).items())


@pytest.mark.parametrize("calibrator", ["lean", "stock"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_choose_from_what_was_seen(model, method, calibrator):
    options = {"percentile": 99.0} if method == "percentile" else {}
    calibrate(model, [batch(0), batch(1)], 2, method=method, calibrator=calibrator, **options)
    quantizer, seen = model.fuser[0]._input_quantizer, []
    with disable_quantization(model):
        model.fuser[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
        for index in range(2):
            run(model, batch(index))
    values = np.concatenate([tensor.ravel() for tensor in seen])
    if calibrator == "lean":
        assert quantizer.amax.item() == choose_amax({"": Histogram.from_values(values)}, method, **options)[""]
    else:
        histogram = quantizer._calibrator
        counts, edges = histogram._calib_hist.numpy(), histogram._calib_bin_edges.numpy()
        assert counts.sum() == values.size
        assert quantizer.amax.item() == np.float32(stock_amax(counts, edges, method, **options))


def test_both_calibrators_choose_nearly_the_same_range(model):
    amax = {}
    for calibrator in ("stock", "lean"):
        calibrate(model, [batch(0)], calibrator=calibrator)
        amax[calibrator] = {name: q.amax for name, q in named_quantizers(model).items() if q.axis is None}
    ratios = [(amax["lean"][name] / stock).item() for name, stock in amax["stock"].items()]
    assert np.median(np.abs(np.log(ratios))) < 0.02
    assert max(np.abs(np.log(ratios))) < 0.2


def test_a_method_for_each_part_of_the_model(model):
    calibrate(model, [batch(0)], method="max")
    largest = {name: q.amax for name, q in named_quantizers(model).items()}
    calibrate(model, [batch(0)], method={"*": "max", "decoder.*": "entropy"})
    changed = {name for name, q in named_quantizers(model).items() if not torch.equal(q.amax, largest[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    with pytest.raises(QuantizationError, match=r"no calibration method is given for encoders\."):
        calibrate(model, [batch(0)], method={"decoder.*": "max"})


def test_weights_by_mse(model):
    calibrate(model, [batch(0)], weight_method="mse")
    layer = model.fuser[0]
    expected = weight_amax(layer.weight, 0, "mse")
    assert torch.equal(layer._weight_quantizer.amax, expected)
    assert (expected.flatten() < layer.weight.detach().abs().amax((1, 2, 3))).any()


def test_statistics_are_left_out_of_the_model(model):
    before = len(pickle.dumps(model))
    calibrators = {name: q._calibrator for name, q in named_quantizers(model).items()}
    calibrate(model, [batch(0)])
    assert all(q._calibrator is calibrators[name] for name, q in named_quantizers(model).items())
    assert len(pickle.dumps(model)) - before < 100_000


def test_an_unknown_method_or_calibrator_is_refused_before_any_batch(model):
    batches = Counted(1)
    with pytest.raises(QuantizationError, match="must be one of mse, entropy, percentile, max, got 'median'"):
        calibrate(model, batches, method="median")
    with pytest.raises(QuantizationError, match="unknown calibrator 'sock': choose lean or stock"):
        calibrate(model, batches, calibrator="sock")
    assert batches.taken == 0


@pytest.mark.parametrize("calibrator", ["lean", "stock"])
def test_a_percentile_of_zeros_is_named(model, calibrator):
    with pytest.raises(QuantizationError, match=r"not finite and positive: .* \(0\).*percentile"):
        calibrate(model, [batch(0)], method="percentile", percentile=0.0, calibrator=calibrator)


@pytest.mark.parametrize("number", [0, -1])
def test_no_batches_are_refused(model, number):
    with pytest.raises(QuantizationError, match=f"at least one batch, got {number}"):
        calibrate(model, [batch(0)], number)


def test_an_empty_loader_is_refused(model):
    with pytest.raises(QuantizationError, match="the data loader is empty"):
        calibrate(model, [], 1)


def test_a_quantizer_that_saw_no_data_is_named(model):
    def camera_off(m, b):
        b.voxels = (b.voxels[0], b.voxels[1])
        m.encoders["lidar"]["backbone"](b.voxels)

    with pytest.raises(QuantizationError, match=r"no data.*encoders\.camera\.backbone\.conv1\._input_quantizer.* more"):
        quantize.calibrate_model(model, [batch(0)], "cpu", camera_off, 1)


def test_a_quantizer_that_saw_only_zeros_is_named(model):
    def black(m, b):
        b.images = torch.zeros_like(b.images)
        run(m, b)

    with pytest.raises(QuantizationError, match=r"only zeros, reached encoders\.camera\.backbone\.conv1\._input_quant"):
        quantize.calibrate_model(model, [batch(0)], "cpu", black, 1)


def test_disabled_quantizers_take_no_part(model):
    disable_quantization(model.encoders["camera"]["backbone"].conv1).apply()

    def black(m, b):
        b.images = torch.zeros_like(b.images)
        run(m, b)

    quantize.calibrate_model(model, [batch(0)], "cpu", black, 1)
    assert model.encoders["camera"]["backbone"].conv1._input_quantizer.amax is None


def poisoned_run(value: float):
    def poison(m, b):
        run(m, b)
        b.images[0, 0, 3, 3] = value

    return poison


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_data_is_named_with_its_batch(model, value):
    data = [batch(0)] * 2  # poisoned by the first forward, met by the second
    options = {"name_of": lambda number, one: f"frame {number} of {one.images.shape[0]} images"}
    with pytest.raises(QuantizationError, match=r"camera\.backbone\.conv1\._.* got .* values in frame 2 of 1 images"):
        quantize.calibrate_model(model, data, "cpu", poisoned_run(value), 2, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_librarys_calibrators_name_nonfinite_data_too(model, value):
    data = [batch(0)] * 2
    with pytest.raises(QuantizationError, match=r"NaN or infinity in batch 2 at encoders\.camera\.backbone\.conv1\._"):
        quantize.calibrate_model(model, data, "cpu", poisoned_run(value), 2, calibrator="stock")


def test_nan_in_a_weight_is_named(model):
    with torch.no_grad():
        model.fuser[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"fuser\.0: a weight of shape .* holds NaN"):
        calibrate(model, [batch(0)])


def test_the_models_device_is_checked(model):
    with pytest.raises(QuantizationError, match="on cuda:0 was asked for, but the model is on cpu"):
        quantize.calibrate_model(model, [batch(0)], 0, run, 1)


def test_a_model_without_quantizers_is_refused():
    with pytest.raises(QuantizationError, match="has no quantizers"):
        check_calibrated(nn.Conv2d(1, 1, 1))


def test_check_names_quantizers_without_amax(model):
    with pytest.raises(QuantizationError, match=r"no finite, positive amax in encoders\.camera\.backbone\.conv1\._"):
        check_calibrated(model)


def test_progress_wraps_the_iteration(model):
    calls = []

    def progress(iterable, total):
        calls.append(total)
        return iterable

    observe(model, CountedSized(5), 3, run, progress)
    observe(model, CountedSized(2), 3, run, progress)
    observe(model, Counted(2), 3, run, progress)
    assert calls == [3, 2, 3]


def test_the_default_forward_is_a_detectors(model):
    calls = []
    run_detector(lambda **arguments: calls.append(arguments), {"img": 1})
    assert calls == [{"return_loss": False, "rescale": True, "img": 1}]


def test_set_quantizer_fast_counts_without_numpy(model):
    histogram = model.fuser[0]._input_quantizer._calibrator
    histogram._torch_hist = False
    quantize.set_quantizer_fast(model)
    assert histogram._torch_hist


def test_reset_statistics_forgets(model):
    observe(model, [batch(0)], 1, run)
    reset_statistics(model)
    assert model.fuser[0]._input_quantizer._calibrator.compute_amax("mse") is None


def test_status_rows_and_table(model, capsys):
    calibrate(model, [batch(0)])
    quantize.disable_layers(model, ["fuser.0"])
    rows = {row.name: row for row in layer_status(model)}
    assert list(rows) == list(quantized_layers(model))
    fuser, concat = rows["fuser.0"], rows["encoders.camera.neck.concats.0"]
    assert (fuser.kind, fuser.disabled, fuser.shared_with) == ("QuantConv2d", True, ())
    assert 0 < fuser.weight_amax[0] <= fuser.weight_amax[1]
    assert fuser.input_amax == model.fuser[0]._input_quantizer.amax.item()
    assert concat.weight_amax is None
    assert "encoders.camera.neck.lateral_convs.0.conv" in concat.shared_with
    quantize.print_quantizer_status(model)
    printed = capsys.readouterr().out
    assert printed == quantizer_table(model) + "\n"
    assert len(printed.splitlines()) == len(rows) + 1
    line = next(line for line in printed.splitlines() if line.startswith("fuser.0 "))
    assert line.split()[1:3] == ["QuantConv2d", "float"]


def test_status_before_calibration(model):
    assert all(row.input_amax is None and row.weight_amax is None for row in layer_status(model))
    assert quantizer_table(model).splitlines()[1].split()[2:] == ["int8", "-", "-", "-"]
