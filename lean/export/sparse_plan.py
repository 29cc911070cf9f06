"""From recorded calls to the layers of the runtime: ReLUs inside convolutions, and a precision for every tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lean.errors import QuantizationError
from lean.export.sparse_trace import Call
from lean.layers import QuantLayer, QuantSparseConvolution

INT8, FP16 = "int8", "fp16"


@dataclass(frozen=True)
class Step(Call):
    """One layer of the runtime.

    Attributes:
        relu: whether a convolution applies a ReLU to its output.
        precision: `int8` or `fp16`, in which the layer computes.
        output_precision: in which its output is stored: `int8` if everything that reads it reads `int8`.
    """

    relu: bool = False
    precision: str = FP16
    output_precision: str = FP16


def plan(calls: Sequence[Call], fp16: bool) -> list[Step]:
    """Turn recorded calls into steps whose tensors are numbered in order; the last step makes the result.

    Args:
        fp16: compute everything in `fp16`; otherwise enabled quantised layers compute in `int8`.

    Raises:
        QuantizationError: a layer has one quantizer that is on and one that is off.
    """
    steps = _renumber(_fold_relus([Step(**vars(call)) for call in calls]))
    steps = [replace(step, precision=_precision(step, fp16)) for step in steps]
    return [replace(step, output_precision=_output_precision(step, steps)) for step in steps]


def _readers(number: int, steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if number in step.inputs]


def _fold_relus(steps: list[Step]) -> list[Step]:
    """Let convolutions apply the ReLU that alone reads their output."""
    folded: list[Step] = []
    for step in steps:
        if isinstance(step.layer, QuantSparseConvolution):
            step = replace(step, relu=step.layer.activation == "relu")
        elif isinstance(step.layer, nn.ReLU):
            source = next((i for i, other in enumerate(folded) if other.output == step.inputs[0]), None)
            conv = folded[source] if source is not None else step
            if isinstance(conv.layer, QuantSparseConvolution) and len(_readers(conv.output, steps)) == 1:
                folded[source] = replace(conv, relu=True, output=step.output)
                continue
        folded.append(step)
    return folded


def _renumber(steps: list[Step]) -> list[Step]:
    numbers = {0: 0} | {step.output: number for number, step in enumerate(steps, 1)}
    return [replace(s, inputs=tuple(numbers[i] for i in s.inputs), output=numbers[s.output]) for s in steps]


def _precision(step: Step, fp16: bool) -> str:
    if fp16 or not isinstance(step.layer, QuantLayer) or step.layer.is_disabled:
        return FP16
    if any(quantizer._disabled for quantizer in step.layer.quantizers):
        raise QuantizationError(f"{step.name}: one of its quantizers is on and one is off; enable or disable both")
    return INT8


def _output_precision(step: Step, steps: Sequence[Step]) -> str:
    """Look at what reads the output, through ReLUs; the last output is read as `fp16`."""
    readers = _readers(step.output, steps)
    ready = [
        _output_precision(reader, steps) if isinstance(reader.layer, nn.ReLU) else reader.precision
        for reader in readers
    ]
    return INT8 if ready and all(precision == INT8 for precision in ready) else FP16
