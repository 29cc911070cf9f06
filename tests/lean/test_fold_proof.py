"""Folding is compared with the network before it, and a layer that it changes is named."""

import pytest
import torch
from torch import nn

from lean.bevfusion_recipe import default_recipe
from lean.errors import QuantizationError
from lean.fold_proof import fold_proven
from lean.insert import insert_quantizers
from lean.switches import named_quantizers
from tests.lean.tiny import TinyFusion, batch, run

OUTPUTS = ("encoders.lidar.backbone", "fuser", "decoder")


@pytest.fixture
def model():
    model = TinyFusion()
    insert_quantizers(model, default_recipe(model))
    return model


def prove(model, **options):
    return fold_proven(model, lambda: run(model, batch()), OUTPUTS, **options)


def test_a_fold_that_changes_nothing_is_proven_for_every_layer(model):
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    proof = prove(model)
    assert {pair.conv for pair in proof.pairs} == set(proof.layers)
    assert len(proof.layers) == norms - 1  # the head's follows a Conv1d
    assert list(proof.outputs) == ["encoders.lidar.backbone", "fuser", "decoder"]
    assert max(*proof.outputs.values(), *proof.layers.values()) < 2e-6
    assert not any(q._disabled for q in named_quantizers(model).values())
    assert not any(m._forward_hooks for m in model.modules())


class LoudNorm(nn.BatchNorm2d):
    """Computes something else than folding takes it for."""

    def forward(self, x):
        return super().forward(x) * 1.001


class Twice(nn.Sequential):
    """Uses the convolution's output a second time."""

    def forward(self, x):
        return super().forward(x) + self[0](x)


def loud(model):
    norm = LoudNorm(8)
    norm.load_state_dict(model.decoder.neck.deblocks[0][1].state_dict())
    model.decoder.neck.deblocks[0][1] = norm.eval()


def twice(model):
    model.fuser = Twice(*model.fuser)


@pytest.mark.parametrize(("damage", "layer"), [(loud, "decoder.neck.deblocks.0.0 (1.0e-03)"), (twice, "fuser.0 (inf)")])
def test_the_layer_that_folding_changes_is_named(model, damage, layer):
    damage(model)
    with pytest.raises(QuantizationError) as caught:
        prove(model)
    assert f"by more than 1e-04 relative, first at {layer}" in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_float_network_that_gives_nan_is_no_matter_of_folding(model):
    model.fuser[1].running_var[0] = -1
    with pytest.raises(QuantizationError, match="the float network gives NaN or infinity at fuser"):
        prove(model)


def test_a_single_voxel_is_enough(model):
    one = batch()
    one.voxels = one.voxels[0][:1], one.voxels[1][:1]
    proof = fold_proven(model, lambda: run(model, one), OUTPUTS)
    assert torch.tensor(list(proof.outputs.values())).max() < 1e-5
