"""A TensorQuantizer that fake-quantises in one kernel where no gradient is wanted."""

from __future__ import annotations

from pytorch_quantization.nn import TensorQuantizer
from torch import Tensor

from lean import kernels


class FusedQuantizer(TensorQuantizer):
    """pytorch-quantization's quantizer with the same results; training and ONNX export take the library's own way."""

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        """Quantise and dequantise `inputs` (any shape), with the calibrated amax."""
        amax = self._buffers.get("_amax")  # a module's attributes of this sort are slow to look up
        plain = self._fake_quant and not self._learn_amax and self._scale_amax is None
        if amax is None or not plain or self.use_fb_fake_quant or not kernels.can_fake_quantize(inputs, amax):
            return super()._quant_forward(inputs)
        return kernels.fake_quantize(inputs, amax, self._num_bits, self._unsigned, self._narrow_range)
