"""The made-up frame fits the model, and reaches all of it."""

import torch

from bevfusion.config import load_config
from bevfusion.models import build_model
from qat.made_up import made_up_batch
from tests.conftest import ROOT


def test_it_reaches_both_sensors_and_is_the_same_each_time():
    model = build_model(load_config(ROOT / "configs/demo/camera+lidar/resnet50.yaml").model)
    reached = []
    for name in ("camera", "lidar"):
        part = model.encoders[name]["vtransform" if name == "camera" else "backbone"]
        part.register_forward_hook(lambda *call: reached.append(call[-1].abs().max().item()))
    with torch.no_grad():
        found = model(**made_up_batch(model))[0]
    assert len(found["scores_3d"]) > 0
    assert len(reached) == 2
    assert min(reached) > 0
    first, second = made_up_batch(model), made_up_batch(model)
    assert all(torch.equal(value, second[name]) for name, value in first.items() if isinstance(value, torch.Tensor))
    assert torch.equal(first["points"][0], second["points"][0])
