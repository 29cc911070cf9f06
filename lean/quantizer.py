"""pytorch-quantization's TensorQuantizer, mended where it fails on the CPU or on an empty tensor."""

import torch
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from lean.fused import FusedQuantizer
from lean.recipe import QuantizerSpec
from lean.stock import StockHistogram

TINY = torch.finfo(torch.float32).tiny


class Quantizer(FusedQuantizer):
    """Fake-quantises a tensor with the amax (a buffer `_amax`) that calibration has set.

    Args:
        spec: bits, range and kind of statistics.
        axis: axis with one scale per index; None means one scale for the whole tensor.
    """

    def __init__(self, spec: QuantizerSpec, axis: int | None = None):
        super().__init__(
            QuantDescriptor(
                num_bits=spec.num_bits,
                axis=axis,
                unsigned=spec.unsigned,
                narrow_range=spec.narrow_range,
                calib_method="max",
            )
        )
        if spec.calibrator == "histogram":
            self._calibrator = StockHistogram(spec.num_bits, axis, spec.unsigned)

    def forward(self, inputs: Tensor) -> Tensor:
        """Quantise and dequantise `inputs`; an empty tensor (a frame without voxels) passes as it is."""
        return inputs if inputs.numel() == 0 else super().forward(inputs)

    @property
    def is_rounding(self) -> bool:
        """Whether `forward` rounds to the calibrated range: not disabled, and not just observing."""
        return self._if_quant and self._fake_quant and not self._disabled and "_amax" in self._buffers

    @property
    def step(self) -> Tensor:
        """What one integer is worth, in the shape of amax."""
        return self._amax.clamp(min=TINY) / (2 ** (self._num_bits - 1 + int(self._unsigned)) - 1)

    def set_amax(self, amax: Tensor) -> None:
        """Set amax (scalar, or one value per index of the axis with the other axes 1), replacing an earlier one."""
        self.register_buffer("_amax", amax.detach().clone())

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Make room for an amax in `state_dict`; the library's own version needs CUDA for that."""
        saved = state_dict.get(f"{prefix}_amax")
        if saved is not None and "_amax" not in self._buffers:
            self.register_buffer("_amax", torch.empty_like(saved))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
