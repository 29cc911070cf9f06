"""What must hold of a model before it is exported."""

import torch
from torch import nn

from lean.calibrate import check_calibrated
from lean.errors import QuantizationError
from lean.switches import named_quantizers


def check_exportable(model: object, fp16: bool = False) -> None:
    """Refuse what can't be written; with `fp16` a model needs no quantizers.

    Raises:
        QuantizationError: not a model, no quantizers, a quantizer without a usable amax or of another kind than signed
            8 bit, or a parameter that holds NaN or infinity.
    """
    if not isinstance(model, nn.Module):
        raise QuantizationError(
            f"export needs the whole model that qat/ptq.py saves, not a {type(model).__name__} of tensors"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise QuantizationError(f"{name} holds NaN or infinity; check the checkpoint")
    if fp16:
        return
    quantizers = named_quantizers(model)
    if not quantizers:
        raise QuantizationError("the model is not quantised: run qat/ptq.py first, or export it with --fp16")
    check_calibrated(model)
    for name, quantizer in quantizers.items():
        if not quantizer._disabled and (quantizer._num_bits != 8 or quantizer._unsigned):
            raise QuantizationError(f"{name} is not signed 8 bit; the runtime knows no other integers")
