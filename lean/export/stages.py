"""The stages of the deployed detector: what the five files compute, executed from the files or by the model itself.

Both know tensors only. What lies between the stages (voxelisation, depth maps, pooling, box decoding) is the caller's.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto
from torch import Tensor, nn

from lean.errors import QuantizationError
from lean.export.dense import LAYERNORM_DOMAIN
from lean.export.head import BBoxHead
from lean.export.parts import CameraBackbone, Fuser, check_sensors
from lean.export.scn_interpreter import SparseInterpreter

CAMERA, TRANSFORM, LIDAR, FUSER, HEAD = STAGES = (
    *("camera.backbone", "camera.vtransform", "lidar.backbone", "fuser", "head.bbox"),
)
DENSE = (CAMERA, TRANSFORM, FUSER, HEAD)
_ANOTHER = "the files were exported from another config"
ORDERS = {"xyz": (0, 1, 2, 3), "zyx": (0, 3, 2, 1)}  # columns of (batch, x, y, z) as a LiDAR file wants them
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Stages:
    """What computes the stages.

    Inputs and outputs have the names of the files' tensors, except for the LiDAR branch, where they are `features`
    (V, C), `coordinates` (V, 4) of (batch, x, y, z) with batch 0, and `lidar` (1, C', X, Y).

    Attributes:
        recorded: where inputs and outputs are kept as `stage.name`; None keeps none.
    """

    recorded: dict[str, np.ndarray] | None = None

    def run(self, stage: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute one of `STAGES` from its inputs, which may be of any floating type."""
        inputs = self.prepare(stage, inputs)
        outputs = self.compute(stage, inputs)
        if self.recorded is not None:
            self.recorded |= {f"{stage}.{name}": value for name, value in (inputs | outputs).items()}
        return outputs

    def prepare(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Bring the inputs of a stage into the types that it reads."""
        return dict(inputs)

    def compute(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a stage on what `prepare` returned."""
        raise NotImplementedError


class FileStages(Stages):
    """Runs the files of a folder on the CPU: dense ones in onnxruntime, the LiDAR branch in our interpreter.

    Args:
        folder: holds what `qat/export.py` writes, in either form and either precision; of the LiDAR branch's two files
            the first that is there.
        integer: let the LiDAR branch compute in the precision that each layer states, as the runtime does; otherwise in
            float32.

    Attributes:
        shapes: of the files' dense inputs and outputs, by stage and name.
        lidar: the LiDAR branch.

    Raises:
        QuantizationError: a file is missing, damaged, or can't be executed.
    """

    def __init__(self, folder: str | Path, integer: bool = True):
        self.folder, self.integer = Path(folder), integer
        if not self.folder.is_dir():
            raise QuantizationError(f"{folder} is not a folder of ONNX files; name the one that qat/export.py wrote")
        paths = {stage: self.folder / f"{stage}.onnx" for stage in DENSE}
        lidar = {order: self.folder / f"{LIDAR}.{order}.onnx" for order in ORDERS}
        self.order = next((order for order, path in lidar.items() if path.is_file()), "xyz")
        missing = [path.name for path in (*paths.values(), lidar[self.order]) if not path.is_file()]
        if missing:
            raise QuantizationError(f"{folder} lacks {', '.join(missing)}; write all files with qat/export.py")
        self.sessions = {stage: open_session(path) for stage, path in paths.items()}
        self.lidar = SparseInterpreter(lidar[self.order])
        self.shapes = {
            stage: {tensor.name: tuple(tensor.shape) for tensor in (*session.get_inputs(), *session.get_outputs())}
            for stage, session in self.sessions.items()
        }

    @property
    def grid(self) -> tuple[int, ...]:
        """Cells along x, y, z that the LiDAR branch reads."""
        cells = self.lidar.graph.nodes[0]["input_spatial_shape"]
        return tuple(cells if self.order == "xyz" else cells[::-1])

    def prepare(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Check the inputs, and bring them into the types that the files state.

        Raises:
            QuantizationError: an input doesn't fit the file.
        """
        if stage == LIDAR:
            wanted, given = self.lidar.graph.nodes[0]["in_channels"], inputs["features"].shape[1]
            if wanted != given:
                raise QuantizationError(f"{stage}: a voxel has {wanted} features in the file, not {given}: {_ANOTHER}")
            kind = np.float16 if self.integer else np.float32
            return {**inputs, "features": cast(inputs["features"], kind, f"{stage}: features")}
        prepared = {}
        for tensor in self.sessions[stage].get_inputs():
            if tensor.name not in inputs:
                raise QuantizationError(f"{stage}.onnx reads {tensor.name!r}, which {_ANOTHER}")
            value = inputs[tensor.name]
            if list(value.shape) != tensor.shape:
                raise QuantizationError(
                    f"{stage}.onnx: {tensor.name} is {tensor.shape}, not {list(value.shape)}: {_ANOTHER}"
                )
            prepared[tensor.name] = cast(value, TYPES[tensor.type], f"{stage}: {tensor.name}")
        return prepared

    def compute(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a file; its outputs have the types that it states."""
        if stage == LIDAR:
            coordinates = inputs["coordinates"][:, ORDERS[self.order]]
            return {"lidar": self.lidar.run(inputs["features"], coordinates, integer=self.integer)}
        names = [tensor.name for tensor in self.sessions[stage].get_outputs()]
        return dict(zip(names, self.sessions[stage].run(names, dict(inputs)), strict=True))


def cast(value: np.ndarray, kind: type, what: str) -> np.ndarray:
    """Convert to another floating type.

    Raises:
        QuantizationError: a value is beyond its range.
    """
    with np.errstate(over="ignore"):
        converted = value.astype(kind, copy=False)
    if not np.isfinite(converted).all():
        raise QuantizationError(f"{what} holds NaN, or values beyond the range of {np.dtype(kind).name}")
    return converted


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open a dense file as it stands: without onnxruntime's own optimisations, plugin nodes in their standard form.

    Raises:
        QuantizationError: onnxruntime can't execute the file.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        model = standard_layernorm(onnx.load(path))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except DecodeError:
        raise QuantizationError(f"{path} is no ONNX file; export again") from None
    except Exception as error:  # onnxruntime's errors have no common base
        raise QuantizationError(f"{path} can't be executed: {error}") from error


def standard_layernorm(model: ModelProto) -> ModelProto:
    """Replace, in place, the runtime's layer normalisation by the standard one, which has the same inputs."""
    for node in model.graph.node:
        if node.domain == LAYERNORM_DOMAIN:
            node.domain, node.op_type = "", "LayerNormalization"
    return model


class ModelStages(Stages):
    """Lets the PyTorch model compute the stages, to compare with.

    Args:
        model: a detector with both sensors and an object head, float or quantised, in evaluation mode.

    Raises:
        QuantizationError: the model is another.
    """

    def __init__(self, model: nn.Module):
        check_sensors(model)
        self.device = next(model.parameters()).device
        head = BBoxHead(model).to(self.device)
        camera, transform = CameraBackbone(model), model.encoders["camera"]["vtransform"].downsample
        backbone = model.encoders["lidar"]["backbone"]
        self.parts = {
            CAMERA: (camera, ("camera_feature", "camera_depth_weights")),
            TRANSFORM: (transform, ("feat_out",)),
            LIDAR: (partial(backbone, batch_size=1), ("lidar",)),
            FUSER: (Fuser(model), ("middle",)),
            HEAD: (head, tuple(head.output_names)),
        }

    @torch.no_grad()
    def compute(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a part of the model; outputs are float32."""
        part, names = self.parts[stage]
        outputs = part(*(torch.from_numpy(value).to(self.device) for value in inputs.values()))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return {name: value.cpu().numpy() for name, value in zip(names, outputs, strict=True)}
