"""Quantisation-aware fine-tuning: train a calibrated model's weights with its quantizers on."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lean.calibrate import check_calibrated
from lean.errors import QuantizationError


def detector_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the training loss (a scalar) of an mmdet3d detector on one batch of its data loader."""
    return model.train_step(batch, None)["loss"]


def qat_train(
    model: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    loss_of: Callable[[nn.Module, Any], Tensor] = detector_loss,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> list[float]:
    """Fine-tune `model` in place; gradients pass the rounding straight through, amax stays as calibrated.

    Follows Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", with ranges fixed after calibration. Call it before ReLUs are fused for export.

    Args:
        optimizer: over the model's parameters.
        loss_of: called with (model, batch), returns a scalar.
        scheduler: stepped after every batch.
        max_grad_norm: gradients are scaled down to this L2 norm.
        progress: wraps the iteration over batches like `tqdm(iterable)`.

    Returns:
        The mean loss of each epoch. The model is left in evaluation mode.

    Raises:
        QuantizationError: `epochs` is not positive, the model isn't calibrated, the loader is empty, or a loss is not
            finite.
    """
    if epochs < 1:
        raise QuantizationError(f"fine-tuning needs at least one epoch, got {epochs}")
    check_calibrated(model)
    means = []
    model.train()
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in data_loader if progress is None else progress(data_loader):
            loss = loss_of(model, batch)
            if not torch.isfinite(loss):
                where = f"epoch {epoch}, batch {len(losses) + 1}"
                raise QuantizationError(f"the loss is {loss.item()} in {where}; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
        if not losses:
            raise QuantizationError("fine-tuning needs at least one batch, but the data loader is empty")
        means.append(sum(losses) / len(losses))
    model.eval()
    return means
