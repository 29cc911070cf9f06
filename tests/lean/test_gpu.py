"""The same on a CUDA device: quantised layers, calibration, saving."""

import copy

import pytest
import torch

from lean import funcs, quantize
from lean.bevfusion_recipe import default_recipe
from lean.calibrate import check_calibrated
from lean.fold import fold_dense, fold_sparse
from lean.insert import insert_quantizers
from lean.switches import disable_quantization, named_quantizers
from tests.lean.tiny import TinyFusion, batch, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models():
    """The tiny model, calibrated with the same batches on the CPU and on the GPU; float32 without TF32."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    on_cpu = TinyFusion()
    insert_quantizers(on_cpu, default_recipe(on_cpu))
    fold_dense(on_cpu)
    fold_sparse(on_cpu.encoders["lidar"]["backbone"])
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for model, device in ((on_cpu, "cpu"), (on_gpu, 0)):
        quantize.calibrate_model(model, [batch(0), batch(1), batch(2)], device, run, 3)
    yield on_cpu, on_gpu
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def run(model, one):
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(one.images.to(device), tuple(tensor.to(device) for tensor in one.voxels)).cpu()


def test_amax_is_that_of_the_cpu_and_lies_on_the_device(models):
    on_cpu, on_gpu = models
    check_calibrated(on_gpu)
    expected = named_quantizers(on_cpu)
    errors = {}
    for name, quantizer in named_quantizers(on_gpu).items():
        assert quantizer.amax.is_cuda
        errors[name] = (quantizer.amax.cpu() / expected[name].amax - 1).abs().max().item()
    assert max(errors.values()) < 2e-2, max(errors, key=errors.get)
    assert max(error for name, error in errors.items() if "_weight_" in name) < 1e-6


def test_float_outputs_agree_and_quantised_ones_nearly(models):
    on_cpu, on_gpu = models
    with disable_quantization(on_cpu), disable_quantization(on_gpu):
        assert relative_error(run(on_gpu, batch(5)), run(on_cpu, batch(5))) < 1e-4
    assert relative_error(run(on_gpu, batch(5)), run(on_cpu, batch(5))) < 0.05


def test_fusing_and_reloading_change_nothing(models, tmp_path):
    model = copy.deepcopy(models[1])
    expected = run(model, batch(5))
    funcs.fuse_relu_only(model.encoders["lidar"]["backbone"])
    assert relative_error(run(model, batch(5)), expected) < 1e-6
    torch.save(model, tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=False)
    assert torch.equal(run(loaded, batch(5)), run(model, batch(5)))
