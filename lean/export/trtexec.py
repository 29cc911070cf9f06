"""Building TensorRT engines from the dense files with `trtexec`, by the rules of each major version.

Version 8 knows weakly typed networks only, whose precisions are chosen by `--fp16 --int8`; version 10 knows both
kinds; version 11 knows strongly typed networks only and has no precision options any more.
"""

import hashlib
import json
import logging
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from lean.errors import QuantizationError

logger = logging.getLogger(__name__)

VERSIONS = (8, 10, 11)
ENGINES = ("camera.backbone", "camera.vtransform", "fuser", "head.bbox")
FP16_LINEAR = "fp16:chw"  # what the runtime's own kernels read and write
TYPES = {"INT8": ("int8",), "FP16": ("fp16", "half"), "FP32": ("fp32", "float"), "INT32": ("int32", "int64")}


@dataclass(frozen=True)
class Network:
    """What the build has to know of an ONNX file."""

    path: Path
    inputs: int
    outputs: int
    strong: bool
    quantised: bool
    plugins: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Network":
        """Look into an ONNX file.

        Raises:
            QuantizationError: there is no such file, or it is no ONNX file.
        """
        if not path.is_file():
            raise QuantizationError(f"{path}: no such file; write it with qat/export.py")
        try:
            graph = onnx.load(path).graph
        except Exception as error:  # protobuf's errors have no common base
            raise QuantizationError(f"{path} is no ONNX file; export again") from error
        types = {tensor.type.tensor_type.elem_type for tensor in graph.input}
        operators = {(node.domain, node.op_type) for node in graph.node}
        return cls(
            path=path,
            inputs=len(graph.input),
            outputs=len(graph.output),
            strong=types == {TensorProto.FLOAT16},
            quantised=("", "QuantizeLinear") in operators,
            plugins=tuple(sorted(f"{domain}::{op}" for domain, op in operators if domain not in ("", "ai.onnx"))),
        )


def build_command(
    network: Network, version: int, trtexec: Path, engine: Path, plugin_library: Path | None = None
) -> list[str]:
    """The command that builds one engine.

    Raises:
        QuantizationError: that version can't build this file as it was exported, or a plugin library is missing.
    """
    if network.strong and version < 10:
        raise QuantizationError(f"{network.path} is strongly typed: for TensorRT {version} export with --typing weak")
    if not network.strong and version > 10:
        raise QuantizationError(
            f"{network.path} is weakly typed: TensorRT {version} would run it in float32; export with --typing strong"
        )
    command = [
        str(trtexec),
        f"--onnx={network.path}",
        f"--saveEngine={engine}",
        "--inputIOFormats=" + ",".join([FP16_LINEAR] * network.inputs),
        "--outputIOFormats=" + ",".join([FP16_LINEAR] * network.outputs),
        "--skipInference",
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={engine.with_suffix('.layers.json')}",
        "--verbose",
    ]
    if version == 8:
        command[command.index("--skipInference")] = "--buildOnly"
    if network.strong and version == 10:
        command.append("--stronglyTyped")
    if not network.strong:
        command += ["--fp16", *(["--int8"] if network.quantised else [])]
    if network.plugins:
        if plugin_library is None:
            raise QuantizationError(
                f"{network.path} needs {', '.join(network.plugins)}: name its library with --plugin"
            )
        command.append(f"--{'plugins' if version == 8 else 'staticPlugins'}={plugin_library}")
    return command


def trtexec_version(trtexec: Path) -> int:
    """The major version of TensorRT that `trtexec` belongs to, from the banner that it prints.

    Raises:
        QuantizationError: it can't be run, or prints no version.
    """
    try:
        done = subprocess.run([trtexec, "--help"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QuantizationError(f"{trtexec} can't be run ({error}); name TensorRT's trtexec with --trtexec") from None
    if banner := re.search(r"\[TensorRT v(\d+)\]", done.stdout + done.stderr):
        number = int(banner[1])  # 8502 is 8.5.2, 100300 is 10.3.0
        return number // 1000 if number < 10_000 else number // 10_000
    raise QuantizationError(f"{trtexec} does not say its TensorRT version; give it with --trt")


def build(network: Network, command: list[str], engine: Path) -> bool:
    """Run one build unless the engine is up to date; tell whether it ran.

    An engine is up to date if it was built from the same bytes by the same command. What trtexec prints goes to the
    engine's `.log`; a failing build leaves no engine.

    Raises:
        QuantizationError: trtexec fails; the message has its last error and the log's name.
    """
    digest = hashlib.sha256(network.path.read_bytes()).hexdigest()
    record, wanted = engine.with_suffix(".build.json"), {"onnx": digest, "command": command}
    if engine.is_file() and record.is_file() and _read_json(record) == wanted:
        return False
    engine.parent.mkdir(parents=True, exist_ok=True)
    engine.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    log = engine.with_suffix(".log")
    logger.info("%s", " ".join(command))
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status or not engine.is_file():
        engine.unlink(missing_ok=True)
        errors = [line for line in log.read_text(errors="replace").splitlines() if "[E]" in line]
        why = errors[-1].partition("[E]")[2].strip() if errors else f"exit status {status}"
        raise QuantizationError(f"trtexec could not build {engine.name}: {why}; see {log}")
    record.write_text(json.dumps(wanted, indent=2))
    return True


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(errors="replace"))
    except ValueError:
        return None


def layer_precisions(engine: Path) -> Counter[str]:
    """How many layers of a built engine read which type first, from trtexec's layer information beside it.

    A layer's first input decides: that of a convolution in INT8 is INT8. Layers without types count as `unknown`.
    """
    content = _read_json(engine.with_suffix(".layers.json")) if engine.with_suffix(".layers.json").is_file() else None
    layers = content.get("Layers", []) if isinstance(content, dict) else []
    return Counter(_precision(layer) for layer in layers)


def _precision(layer: object) -> str:
    if not isinstance(layer, dict):  # only its name: the engine was built without detailed information
        return "unknown"
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    if not tensors:
        return "unknown"
    fields = ("Format/Datatype", "Datatype", "DataType", "Format")  # one field to TensorRT 10, two from 11 on
    described = " ".join(str(tensors[0].get(name, "")) for name in fields).lower()
    return next((name for name, words in TYPES.items() if any(word in described for word in words)), "unknown")
