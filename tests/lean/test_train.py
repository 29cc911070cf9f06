"""Fine-tuning with the quantizers on."""

import pytest
import torch

from lean import quantize
from lean.errors import QuantizationError
from lean.fold import fold_dense
from lean.switches import named_quantizers
from lean.train import qat_train
from tests.lean.tiny import Decoder, randomise_norms


@pytest.fixture
def task():
    """A calibrated decoder, its inputs, and a loss: the distance to what the float decoder gives."""
    torch.manual_seed(0)
    model = Decoder(4).eval()
    randomise_norms(model)
    inputs = [torch.randn(2, 4, 8, 8) for _ in range(4)]
    with torch.no_grad():
        targets = {id(x): model(x) for x in inputs}
    quantize.quantize_decoder(model)
    fold_dense(model)
    quantize.calibrate_model(model, inputs, "cpu", lambda m, x: m(x), 4)
    return model, inputs, lambda m, x: (m(x) - targets[id(x)]).square().mean()


def train(task, epochs=20, inputs=None, **options):
    model, own, loss_of = task
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return qat_train(model, own if inputs is None else inputs, optimizer, epochs, loss_of=loss_of, **options)


def test_the_quantised_loss_goes_down_and_amax_stays(task):
    model = task[0]
    amax = {name: q.amax.clone() for name, q in named_quantizers(model).items()}
    losses = train(task, max_grad_norm=1.0)
    assert len(losses) == 20
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(q.amax, amax[name]) for name, q in named_quantizers(model).items())
    assert not model.training


def test_every_weight_learns(task):
    model = task[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(task, epochs=1)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_scheduler_and_progress_follow_the_batches(task):
    model, inputs, loss_of = task
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    options = {"loss_of": lambda m, x: loss_of(m, x) * 0, "scheduler": scheduler}
    qat_train(model, inputs, optimizer, 2, **options, progress=lambda batches: seen.append(len(batches)) or batches)
    assert seen == [4, 4]
    assert scheduler.get_last_lr() == [0.5**8]


def test_bad_requests_are_refused(task):
    with pytest.raises(QuantizationError, match="at least one epoch, got 0"):
        train(task, epochs=0)
    with pytest.raises(QuantizationError, match="the data loader is empty"):
        train(task, inputs=[])
    model, inputs, _ = task
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(QuantizationError, match="the loss is nan in epoch 1, batch 1"):
        qat_train(model, inputs, optimizer, 1, loss_of=lambda m, x: m(x).sum() * float("nan"))
    model.backbone.blocks[0][0]._input_quantizer.set_amax(torch.tensor(float("nan")))
    with pytest.raises(QuantizationError, match=r"amax in backbone\.blocks\.0\.0\._input_quantizer"):
        train(task)
