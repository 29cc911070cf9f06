"""The tiny model, quantised and calibrated, for tests."""

import torch

from lean.bevfusion_recipe import default_recipe
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.quantize import calibrate_model
from tests.lean.tiny import TinyFusion, batch, run


def calibrated(seed: int = 0) -> TinyFusion:
    """A folded model with every layer quantised, calibrated on one batch; equal seeds give equal models."""
    torch.manual_seed(seed)
    model = TinyFusion()
    insert_quantizers(model, default_recipe(model))
    fold_sparse(model)
    fold_dense(model)
    calibrate_model(model, [batch(0)], "cpu", run)
    return model
