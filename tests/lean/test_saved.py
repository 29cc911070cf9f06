"""A saved model computes what the calibrated one computed, in another process."""

import subprocess
import sys
from pathlib import Path

import torch

from lean import funcs, quantize
from lean.bevfusion_recipe import default_recipe
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.sharing import sharing_groups
from tests.lean.tiny import TinyFusion, batch, run

RELOAD = """
import sys, torch
from tests.lean.tiny import batch, run
model = torch.load(sys.argv[1], weights_only=False).module
torch.save(run(model, batch(7)), sys.argv[2])
"""


def quantised() -> TinyFusion:
    model = TinyFusion()
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    fold_sparse(model.encoders["lidar"]["backbone"])
    fold_dense(model)
    quantize.calibrate_model(model, [batch(0)], "cpu", run, 1)
    quantize.disable_layers(model, recipe.disable)
    return model


def test_a_fresh_process_gives_the_same_output_bit_for_bit(tmp_path):
    model = quantised()
    expected = run(model, batch(7))
    funcs.fuse_relu_only(model.encoders["lidar"]["backbone"])
    torch.save(torch.nn.DataParallel(model, device_ids=[]), tmp_path / "model.pth")
    command = [sys.executable, "-c", RELOAD, tmp_path / "model.pth", tmp_path / "out.pt"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_reloading_keeps_sharing_and_disabled_layers(tmp_path):
    model = quantised()
    torch.save(model, tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=False)
    assert sharing_groups(loaded) == sharing_groups(model)
    assert quantize.disable_quantization(loaded.fuser).quantizers
    assert loaded.decoder.neck.deblocks[0][0].is_disabled
    assert not loaded.decoder.neck.deblocks[1][0].is_disabled


def test_state_dict_restores_a_freshly_quantised_model():
    model, other = quantised(), TinyFusion()
    recipe = default_recipe(other)
    insert_quantizers(other, recipe)
    fold_sparse(other.encoders["lidar"]["backbone"])
    fold_dense(other)
    other.load_state_dict(model.state_dict())
    quantize.disable_layers(other, recipe.disable)
    assert torch.equal(run(other, batch(7)), run(model, batch(7)))
