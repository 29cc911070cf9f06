"""Proof that a saved model is the one in memory: a fresh process loads its files and runs a frame."""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from spconv.pytorch import SparseConvTensor
from torch import Tensor, nn

from bevfusion.data import to_device
from lean.calibrate import evaluating, model_device
from lean.structure import describe, stored_tensors
from lean.switches import quantized_layers
from lean.threads import cpu_threads
from qat.common import VerificationError
from qat.frames import Frames, first_readable
from qat.fresh_process import FreshProcess
from qat.inference import load_model
from qat.made_up import made_up_batch
from qat.parallel import share_out

CPU = torch.device("cpu")
SKIPPED = "not verified (--no-verify)"

Report = dict[str, dict[str, Any]]


def verify(model: nn.Module, files: Sequence[Path], frames: Frames | None, fresh: FreshProcess) -> str:
    """Compare what the files give in a fresh process with `model`: structure, tensors, and every output for one frame.

    The frame runs on the CPU, wherever the model is: a GPU's kernels are chosen by timing, and add in an order that
    differs from run to run.

    Args:
        frames: the first of them is run; a made-up one if there are none.
        fresh: a started `qat.fresh_process.verifier`.

    Returns:
        What was compared, in a line.

    Raises:
        VerificationError: they differ, naming the first difference of each file.
        InputError: the frame can't be read.
    """
    device = model_device(model)
    model.to(CPU)
    batch = first_batch(frames) if frames else made_up_batch(model)
    with tempfile.TemporaryDirectory(prefix="bevfusion-ptq-") as folder:
        torch.save(batch, Path(folder, "batch.pt"))
        # The files are run at the same time as the model in memory, all with as many threads.
        threads = max(torch.get_num_threads() // (len(files) + 1), 1)
        request = {"files": [str(file.resolve()) for file in files], "threads": threads}
        Path(folder, "request.json").write_text(json.dumps(request))
        fresh.ask(folder)
        with cpu_threads(threads):
            expected = json.loads(json.dumps(report(model, batch)))
        fresh.wait()
        reports = json.loads(Path(folder, "reports.json").read_text())
    for file, found in zip(files, reports, strict=True):
        if problem := first_difference(expected, found):
            raise VerificationError(f"{file.name}, loaded in a fresh process, is not the model in memory: {problem}")
    model.to(device)
    tensors, outputs_ = len(expected["tensors"]), len(expected["outputs"])
    frame = "one frame" if frames else "a made-up frame"
    return f"verified in a fresh process, bit for bit: {tensors} tensors, and {outputs_} outputs for {frame}"


def first_batch(frames: Frames) -> dict:
    """The first calibration frame that can be read, as the model takes it."""
    return to_device(first_readable(frames)[1], CPU)


def report(model: nn.Module, batch: Mapping[str, Any] | None) -> Report:
    """Everything that two equal models have in common, by kind and name: classes, quantisation, tensors, outputs."""
    structure = describe(model)
    return {
        "modules": {name: type(m).__name__ for name, m in model.named_modules(remove_duplicate=False) if name},
        "layers": {state.name: state.to_dict() for state in structure.layers},
        "quantizers": {state.name: state.to_dict() for state in structure.quantizers},
        "tensors": {name: checksum(tensor) for name, tensor in stored_tensors(model).items()},
        "outputs": {} if batch is None else outputs(model, batch),
    }


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of what every quantised layer, every head and the model itself give for a batch, in this order."""
    found: dict[str, str] = {}
    modules = quantized_layers(model) | {f"heads.{name}": head for name, head in model.heads.items()}
    with recording(modules, found), evaluating(model), torch.no_grad():
        _record("result", model(**batch), found)
    return found


@contextmanager
def recording(modules: Mapping[str, nn.Module], found: dict[str, str]) -> Iterator[None]:
    """Add a checksum to `found` for every tensor that one of the modules returns, for the length of a `with` block."""
    handles = [
        module.register_forward_hook(lambda *call, name=name: _record(name, call[-1], found))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(name: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, SparseConvTensor):
        value = (value.features, value.indices)
    if isinstance(value, Mapping):
        for key, item in value.items():
            _record(f"{name}.{key}", item, found)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _record(f"{name}[{number}]", item, found)
    else:
        tensor = getattr(value, "tensor", value)  # boxes hold theirs
        if isinstance(tensor, Tensor):
            again = sum(key.partition("#")[0] == name for key in found)  # a layer may be called more than once
            found[f"{name}#{again + 1}" if again else name] = checksum(tensor)


def checksum(tensor: Tensor) -> str:
    """Dtype, shape and SHA-256 of the values."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}"


def first_difference(expected: Report, found: Report) -> str | None:
    """Name the first thing that differs and how many of its kind do; None if nothing does."""
    for kind in expected:
        names = [*expected[kind], *(name for name in found[kind] if name not in expected[kind])]
        differing = [name for name in names if expected[kind].get(name) != found[kind].get(name)]
        if differing:
            return f"{len(differing)} of {len(names)} {kind} differ, first {differing[0]}"
    return None


def answer(folder: Path) -> None:
    """Do what `verify` asks for; this is the fresh process, which forks for each file and has nothing but imports."""
    request = json.loads((folder / "request.json").read_text())
    files, reports = request["files"], {}

    def report_file(file: str, emit: Callable[[tuple[str, Report]], None]) -> None:
        with cpu_threads(request["threads"]):
            batch = torch.load(folder / "batch.pt", weights_only=False)
            emit((file, report(load_model({}, file, CPU), batch)))

    share_out(files, report_file, lambda found: reports.update([found]), len(files))
    (folder / "reports.json").write_text(json.dumps([reports[file] for file in files]))


if __name__ == "__main__":
    from qat import common

    if asked := sys.stdin.readline().strip():  # nothing, if the run has ended before
        common.run(lambda: answer(Path(asked)))
