"""Load float checkpoints of BEVFusion, whichever layout and wrapping they come in."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor, nn

from bevfusion.errors import InputError

SHOWN = 5


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint did not bring (random weights stay there), brought in vain, or brought in another shape.

    Attributes:
        sha256: checksum of the file that was loaded, in hexadecimal digits.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    sha256: str = ""

    @property
    def complete(self) -> bool:
        """Whether every weight was found and used."""
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        """One line: the count and the first few names of each kind."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": self.misshaped}
        return "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def read_file(path: str | Path, trust_pickle: bool = False) -> object:
    """Read a file of `torch.save` onto the CPU.

    Args:
        trust_pickle: also unpickle classes; the file can then run any code.

    Raises:
        InputError: no such file, not a checkpoint, truncated, damaged, or in need of unpickling without `trust_pickle`.
    """
    path = Path(path)
    with _open(path) as file:
        return _read(file, path, trust_pickle)


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise InputError(f"checkpoint not found: {path}")
    return path.open("rb")


def _read(file: BinaryIO, path: Path, trust_pickle: bool) -> object:
    try:
        _check_sums(file, path)
        return torch.load(file, map_location="cpu", weights_only=not trust_pickle)
    except InputError:
        raise
    except (AttributeError, ImportError):
        if trust_pickle:  # of a class that isn't there, which the caller may know
            raise
        raise InputError(f"{path} is no checkpoint, or a damaged one: copy it again") from None
    except Exception as error:  # torch raises anything when it reads damaged pickles
        wanted = sorted(pickled_classes(path)) if isinstance(error, pickle.UnpicklingError) else ()
        if wanted:
            raise InputError(
                f"{path} holds pickled objects ({', '.join(wanted[:SHOWN])}); "
                "if you trust where it comes from, pass --trust-pickle"
            ) from error
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{path} is not a checkpoint, or is truncated ({reason}): copy it again") from error


def pickled_classes(path: str | Path) -> set[str]:
    """Names of the classes and functions that a file of `torch.save` needs unpickled; none of one that is damaged."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # torch raises anything when it reads damaged pickles
        return set()


def _check_sums(file: BinaryIO, path: Path) -> None:
    """Compare a zip file's parts with their checksums, which torch leaves out; its older format has none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise InputError(f"{path} is damaged, {bad} in it does not fit its checksum: copy it again")
    file.seek(0)


def extract_state_dict(content: object, source: str) -> dict[str, Tensor]:
    """Find the tensors by name in what a checkpoint holds: unwraps `state_dict` or `model`, strips `module.`.

    Raises:
        InputError: there is no state dict in it; `source` names the file in the message.
    """
    if isinstance(content, nn.Module):
        raise InputError(f"{source} holds a whole model, not a float checkpoint's state dict")
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{source} holds no state dict (names mapped to tensors), but a {type(content).__name__}")
    prefix = "module."
    if all(name.startswith(prefix) for name in content):
        return {name[len(prefix) :]: value for name, value in content.items()}
    return dict(content)


def to_spconv2_layout(state: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Bring sparse weights from spconv 1's (kx, ky, kz, in, out) to spconv 2's (out, kx, ky, kz, in), by shape.

    A checkpoint is in one layout throughout: a weight whose shape fits both is decided by the others.

    Raises:
        InputError: the shapes fit both layouts, or some weights one and some the other.
    """
    fits = {"spconv 1": set(), "spconv 2": set()}
    names = []
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if not isinstance(module, SparseConvolution) or key not in state:
            continue
        names.append(key)
        new = tuple(module.weight.shape)
        old = (*new[1:], new[0])
        shape = tuple(state[key].shape)
        fits["spconv 1"] |= {key} if shape == old else set()
        fits["spconv 2"] |= {key} if shape == new else set()
    only_old, only_new = fits["spconv 1"] - fits["spconv 2"], fits["spconv 2"] - fits["spconv 1"]
    if only_old and only_new:
        raise InputError(
            f"{source} mixes sparse weight layouts: {min(only_old)} is (kx, ky, kz, in, out), "
            f"{min(only_new)} is (out, kx, ky, kz, in)"
        )
    if fits["spconv 1"] and not only_old and not only_new:
        raise InputError(f"{source}: the layout of {names[0]} is ambiguous, its shape fits spconv 1 and spconv 2")
    if only_new:
        return state
    return {k: v.permute(4, 0, 1, 2, 3).contiguous() if k in fits["spconv 1"] else v for k, v in state.items()}


def load_checkpoint(
    model: nn.Module, path: str | Path, *, allow_partial: bool = False, trust_pickle: bool = False
) -> LoadReport:
    """Load a float checkpoint into `model`, wholly or, with `allow_partial`, as far as it goes.

    Raises:
        InputError: the file can't be read, or doesn't fit the model; the model is then as it was.
    """
    source = str(path)
    with _open(Path(path)) as file:  # once for both, so that the sum is that of what is loaded
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        state = extract_state_dict(_read(file, Path(path), trust_pickle), source)
    state = to_spconv2_layout(state, model, source)
    expected = model.state_dict()
    # Old checkpoints lack these counters, which only matter for a BatchNorm without momentum.
    missing = tuple(k for k in expected if k not in state and not k.endswith("num_batches_tracked"))
    unexpected = tuple(k for k in state if k not in expected)
    misshaped = tuple(k for k in expected if k in state and state[k].shape != expected[k].shape)
    report = LoadReport(missing, unexpected, misshaped, sha256)
    if not report.complete and not allow_partial:
        raise InputError(f"{source} does not fit the model of the config: {report}")
    usable = {k: v for k, v in state.items() if k in expected and k not in misshaped}
    _refuse_bad_values(usable, source)
    model.load_state_dict(usable, strict=False)
    return report


def _refuse_bad_values(state: Mapping[str, Tensor], source: str) -> None:
    bad = tuple(name for name, value in state.items() if not torch.isfinite(value).all())
    if bad:
        raise InputError(f"{source}: {_listed(bad)} hold{'s' if len(bad) == 1 else ''} NaN or infinity")
    bad = tuple(name for name, value in state.items() if name.endswith("running_var") and (value < 0).any())
    if bad:
        raise InputError(f"{source}: {_listed(bad)}: a variance is negative")
