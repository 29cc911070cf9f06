"""Turning quantizers off and on."""

import pytest
import torch

from lean.bevfusion_recipe import default_recipe
from lean.errors import QuantizationError
from lean.insert import insert_quantizers
from lean.switches import (
    disable_layers,
    disable_quantization,
    enable_quantization,
    named_quantizers,
    quantized_layers,
    quantizer_flags,
    unwrap,
)
from tests.lean.tiny import TinyFusion


@pytest.fixture
def model():
    model = TinyFusion()
    insert_quantizers(model, default_recipe(model))
    return model


def states(model) -> list[bool]:
    return [quantizer._disabled for quantizer in named_quantizers(model).values()]


def test_apply_is_for_good_and_for_the_module_only(model):
    disable_quantization(model.decoder.neck).apply()
    disabled = {name for name, q in named_quantizers(model).items() if q._disabled}
    assert disabled == {
        f"decoder.neck.deblocks.{i}.0.{kind}_quantizer" for i in (0, 1) for kind in ("_input", "_weight")
    }
    enable_quantization(model.decoder.neck).apply()
    assert not any(states(model))


@pytest.mark.parametrize(("switch", "inside"), [(disable_quantization, True), (enable_quantization, False)])
def test_contexts_restore_what_they_found(model, switch, inside):
    disable_quantization(model.fuser).apply()
    before = states(model)
    with switch(model):
        assert set(states(model)) == {inside}
    assert states(model) == before
    assert len(set(before)) == 2


def test_contexts_restore_on_an_exception_and_can_be_nested(model):
    switch = disable_quantization(model)
    with pytest.raises(KeyError), switch:
        with switch, enable_quantization(model.fuser):
            assert len(set(states(model))) == 2
        assert all(states(model))
        raise KeyError
    assert not any(states(model))


def test_flags_are_restored_on_an_exception(model):
    quantizers = named_quantizers(model).values()
    with pytest.raises(KeyError), quantizer_flags(quantizers, _if_quant=False, _if_calib=True):
        assert all(quantizer._if_calib and not quantizer._if_quant for quantizer in quantizers)
        raise KeyError
    assert all(quantizer._if_quant and not quantizer._if_calib for quantizer in quantizers)


def test_disable_layers_by_pattern(model):
    chosen = disable_layers(model, ["decoder.backbone.*", "fuser.0"])
    assert chosen == ["fuser.0", "decoder.backbone.blocks.0.0", "decoder.backbone.blocks.1.0"]
    layers = quantized_layers(model)
    assert [name for name, layer in layers.items() if layer.is_disabled] == chosen


def test_a_pattern_that_fits_nothing_is_refused(model):
    with pytest.raises(QuantizationError, match=r"matched no module; nearest: 'decoder\.backbone'"):
        disable_layers(model, ["decoder.bakbone.*"], "--disable")


def test_a_sharing_group_is_disabled_as_a_whole_or_not_at_all(model):
    block = "encoders.camera.backbone.layer1.0"
    with pytest.raises(QuantizationError, match=f"{block}.conv1 shares its input scale with {block}.add"):
        disable_layers(model, [f"{block}.conv1"])
    assert not any(states(model))
    assert disable_layers(model, [f"{block}.conv1", f"{block}.add"]) == [f"{block}.conv1", f"{block}.add"]


def test_unwrap_looks_inside_data_parallel_wrappers(model):
    wrapper = torch.nn.DataParallel(model)
    assert unwrap(wrapper) is model
    assert unwrap(model) is model
    assert list(named_quantizers(wrapper)) == list(named_quantizers(model))
