"""Writes the dense parts of a detector: camera backbone, view transform, fuser with decoder, and head."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from onnx import ModelProto
from pytorch_quantization.nn import TensorQuantizer
from torch import Tensor, nn

from lean.calibrate import evaluating
from lean.errors import QuantizationError
from lean.export.checks import check_exportable
from lean.export.graph import simplify
from lean.export.half import HalfReport, check_half_range, to_half
from lean.export.head import BBoxHead
from lean.export.lint import Finding, lint
from lean.export.parts import CameraBackbone, Fuser, camera_inputs, check_sensors, pooled_map, sensor_maps
from lean.switches import disable_quantization

logger = logging.getLogger(__name__)

# 13 is the first opset with scales per channel, and what the original files have; 19 the first with FP16 scales.
OPSET = {"weak": 13, "strong": 19}
LAYERNORM_DOMAIN = "nv"


@dataclass(frozen=True)
class DenseOptions:
    """How the dense files are written.

    Attributes:
        typing: `strong` (FP16 tensors, for strongly typed networks) or `weak` (float32 tensors, for builders that
            choose the precision themselves).
        fp16: leave all quantizers out.
        layernorm_plugin: write layer normalisations as the runtime's plugin node.
        cameras: images of a frame.
    """

    typing: str = "strong"
    fp16: bool = False
    layernorm_plugin: bool = False
    cameras: int = 6

    def __post_init__(self):
        if self.typing not in OPSET:
            raise QuantizationError(f"typing must be one of {', '.join(OPSET)}, got {self.typing!r}")


@dataclass(frozen=True)
class Written:
    """What became of one file: what each layer runs in, and where FP16 was departed from."""

    path: Path
    findings: list[Finding]
    half: HalfReport = field(default_factory=HalfReport)


@contextmanager
def exportable_quantizers() -> Iterator[None]:
    """Let all quantizers compute by torch's own operators, which have an ONNX form, for the length of a block."""
    before = TensorQuantizer.use_fb_fake_quant
    TensorQuantizer.use_fb_fake_quant = True
    try:
        yield
    finally:
        TensorQuantizer.use_fb_fake_quant = before


def trace(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int) -> ModelProto:
    """Write `module` in evaluation mode as a simplified float32 ONNX graph, its quantizers as Q/DQ pairs."""
    buffer = io.BytesIO()
    with torch.no_grad(), evaluating(module), exportable_quantizers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are meant to become constants, and this exporter is meant to be used
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            buffer,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamo=False,
        )
    return simplify(onnx.load_from_string(buffer.getvalue()))


def write_part(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path, options: DenseOptions
) -> tuple[Written, ModelProto]:
    """Trace one part, check it, bring it into the wanted type and write it.

    Raises:
        QuantizationError: a value is beyond FP16's range.
    """
    model = trace(module, inputs, outputs, OPSET[options.typing])
    check_half_range(model, path.name)
    report = HalfReport()
    if options.typing == "strong":
        model, report = to_half(model)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    logger.info("%s: %d nodes", path.name, len(model.graph.node))
    return Written(path, lint(model), report), model


@contextmanager
def _prepared(model: nn.Module, options: DenseOptions) -> Iterator[None]:
    check_exportable(model, options.fp16)
    check_sensors(model)
    with disable_quantization(model) if options.fp16 else nullcontext():
        yield


def export_camera(model: nn.Module, folder: Path, options: DenseOptions) -> list[Written]:
    """Write `camera.backbone.onnx` and `camera.vtransform.onnx` into `folder`.

    Raises:
        QuantizationError: the model can't be exported.
    """
    with _prepared(model, options):
        downsample = model.encoders["camera"]["vtransform"].downsample
        images, outputs = camera_inputs(model, options.cameras), ("camera_feature", "camera_depth_weights")
        backbone, _ = write_part(CameraBackbone(model), images, outputs, folder / "camera.backbone.onnx", options)
        pooled = {"feat_in": pooled_map(model)}
        transform, _ = write_part(downsample, pooled, ("feat_out",), folder / "camera.vtransform.onnx", options)
    return [backbone, transform]


def export_transfuser(model: nn.Module, folder: Path, options: DenseOptions) -> list[Written]:
    """Write `fuser.onnx` and `head.bbox.onnx` into `folder`.

    Raises:
        QuantizationError: the model can't be exported.
    """
    with _prepared(model, options):
        fuser, graph = write_part(Fuser(model), sensor_maps(model), ("middle",), folder / "fuser.onnx", options)
        shape = [dim.dim_value for dim in graph.graph.output[0].type.tensor_type.shape.dim]
        head = BBoxHead(model, options.layernorm_plugin)
        middle = {"middle": torch.rand(shape)}
        boxes, _ = write_part(head, middle, head.output_names, folder / "head.bbox.onnx", options)
    return [fuser, boxes]
