"""Calibration: how many batches run, what they leave, and what is refused."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from lean import quantize
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights, check_calibrated, observe, reset_statistics, run_detector
from lean.errors import QuantizationError
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.status import layer_status, quantizer_table
from lean.stock import stock_amax
from lean.switches import disable_quantization, named_quantizers, quantized_layers
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


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile", "max"])
def test_methods_choose_from_the_histogram_that_was_collected(model, method):
    options = {"percentile": 99.0} if method == "percentile" else {}
    calibrate(model, [batch(0)], method=method, **options)
    quantizer = model.fuser[0]._input_quantizer
    histogram = quantizer._calibrator
    counts, edges = histogram._calib_hist.numpy(), histogram._calib_bin_edges.numpy()
    assert quantizer.amax.item() == np.float32(stock_amax(counts, edges, method, **options))


def test_an_unknown_method_is_refused(model):
    with pytest.raises(QuantizationError, match="must be one of mse, entropy, percentile, max, got 'median'"):
        calibrate(model, [batch(0)], method="median")


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_data_is_named_with_its_batch(model, value):
    def poison(m, b):
        run(m, b)
        b.images[0, 0, 3, 3] = value

    data = [batch(0)] * 2  # poisoned by the first forward, met by the second
    with pytest.raises(QuantizationError, match=r"NaN or infinity in batch 2 at encoders\.camera\.backbone\.conv1\._"):
        quantize.calibrate_model(model, data, "cpu", poison, 2)


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
