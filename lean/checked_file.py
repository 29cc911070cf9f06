"""Named tensors and a JSON document in one safetensors file, each with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lean.errors import QuantizationError

KEY = "lean"  # one key: safetensors writes several in an order of its own
DAMAGED = "copy it again, or quantise anew"


def need_safetensors() -> None:
    """Refuse to go on where the file format's package is missing.

    Raises:
        QuantizationError: it is.
    """
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise QuantizationError("the package safetensors is not installed: run make setup, or pip install it") from None


def pack(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file with these tensors and this document, equal for equal content.

    Args:
        tensors: any dtype, shape and device.
        document: mappings with text as keys, lists, and scalars.

    Raises:
        QuantizationError: the document holds something else, or safetensors is missing.
    """
    need_safetensors()
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"document": plain(document), "tensors": {name: _described(copies[name]) for name in sorted(copies)}}
    text = _compact({"content": content, "sha256": _sha256(_compact(content).encode())})
    return save(copies, {KEY: text})


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `pack` gave: tensors on the CPU, and the document.

    Raises:
        QuantizationError: the file is missing, truncated or damaged (naming the tensor, or the metadata), or holds
            something else.
    """
    need_safetensors()
    import safetensors
    from safetensors.torch import load

    data = _read(path)
    content = _content(data, path)
    try:
        tensors = load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise QuantizationError(f"{path} is damaged: its list of tensors is unreadable ({error}); {DAMAGED}") from None
    wanted = content["tensors"]
    for name in [*wanted, *tensors]:
        if name not in tensors or name not in wanted or _described(tensors[name]) != wanted[name]:
            raise QuantizationError(f"{path} is damaged: tensor {name!r} does not fit its checksum; {DAMAGED}")
    return tensors, content["document"]


def holds_checked(path: Path) -> bool:
    """Whether a file is a safetensors file, by its first bytes, or by its name where they are damaged."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def plain(value: Any, where: str = "") -> Any:
    """Copy mappings, sequences and scalars as JSON gives them back; raises QuantizationError for anything else."""
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise QuantizationError(f"{where or 'the document'} has the key {odd[0]!r}: only text can be saved")
        return {key: plain(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise QuantizationError(f"{where or 'the document'} is a {type(value).__name__}: it can't be saved")


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))  # in the order as it is: a model's parts may follow its config's


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _described(tensor: Tensor) -> dict[str, Any]:
    """What a tensor has to be: dtype, shape, and the checksum of its values."""
    values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": _sha256(values)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise QuantizationError(f"file not found: {path}") from None
    except OSError as error:
        raise QuantizationError(f"{path} can't be read ({error.strerror})") from None


def _content(data: bytes, path: Path) -> dict[str, Any]:
    """The checked metadata of a file's bytes."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > 2**32:
        raise QuantizationError(f"{path} is no safetensors file, or a truncated one: {DAMAGED}")
    if len(data) < 8 + size:
        raise QuantizationError(f"{path} is truncated within its metadata: {DAMAGED}")
    try:
        header = json.loads(data[8 : 8 + size])
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        text = header.get("__metadata__", {}).get(KEY)
        sealed = None if text is None else json.loads(text)
        whole = sealed is None or sealed["sha256"] == _sha256(_compact(sealed["content"]).encode())
        if whole and len(data) < 8 + size + max(ends, default=0):
            raise QuantizationError(f"{path} is truncated ({len(data)} of {8 + size + max(ends)} bytes): {DAMAGED}")
    except QuantizationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        whole = False
    if not whole:
        raise QuantizationError(f"{path} is damaged: its metadata does not fit its checksum; {DAMAGED}")
    if sealed is None:
        raise QuantizationError(f"{path} was not written by qat/ptq.py: it is a safetensors file of something else")
    return sealed["content"]
