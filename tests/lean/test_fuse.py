"""ReLUs moved into the sparse convolutions."""

import pytest
import torch
from torch import nn

from lean import funcs, quantize
from lean.errors import QuantizationError
from lean.fold import fold_sparse
from lean.fuse import fuse_relu
from tests.lean.tiny import SparseBackbone, randomise_norms, voxels

STAGE = "encoder_layers.encoder_layer1"


@pytest.fixture
def backbone():
    """A quantised, folded and calibrated LiDAR backbone."""
    model = SparseBackbone().eval()
    randomise_norms(model)
    quantize.quantize_encoders_lidar_branch(model)
    fold_sparse(model)
    quantize.calibrate_model(model, [voxels(0), voxels(1)], "cpu", lambda m, x: m(x), 2)
    return model


def test_outputs_stay_the_same_bit_for_bit(backbone):
    with torch.no_grad():
        expected = backbone(voxels(2))
        assert funcs.fuse_relu_only(backbone) is backbone
        assert torch.equal(backbone(voxels(2)), expected)
        with quantize.disable_quantization(backbone):
            plain = backbone(voxels(2))
    assert (plain >= 0).all()
    assert (plain == 0).any()
    assert not torch.equal(plain, expected)


def test_which_convolutions_apply_it(backbone):
    fused = fuse_relu(backbone)
    assert set(fused) == {"conv_input.0", f"{STAGE}.0.conv1", f"{STAGE}.1.0", "conv_out.0"}
    layers = dict(backbone.named_modules())
    assert all(layers[name].activation == "relu" for name in fused)
    assert layers[f"{STAGE}.0.conv2"].activation == "none"
    assert [n for n, m in layers.items() if isinstance(m, nn.ReLU)] == [f"{STAGE}.0.relu"]


def test_fusing_again_changes_nothing(backbone):
    fuse_relu(backbone)
    with torch.no_grad():
        expected = backbone(voxels(2))
        assert fuse_relu(backbone) == [f"{STAGE}.0.conv1"]
        assert torch.equal(backbone(voxels(2)), expected)


def test_an_unfolded_norm_is_named():
    model = SparseBackbone()
    quantize.quantize_encoders_lidar_branch(model)
    with pytest.raises(QuantizationError, match=r"conv_input\.0: fold its batch normalisation"):
        fuse_relu(model)


def test_float_convolutions_are_left_alone():
    model = SparseBackbone()
    assert fuse_relu(model) == []
    assert isinstance(model.conv_input[2], nn.ReLU)
