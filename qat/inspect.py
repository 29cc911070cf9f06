#!/usr/bin/env python3
"""Show what a quantised model's file is: what it was made of, and what became of each layer; or how two differ."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose `inspect` would hide the standard library's

import argparse
import json
from typing import TYPE_CHECKING, Any

from qat import arguments, common, tables

if TYPE_CHECKING:
    from lean.artifact import Artifact

SHOWN = 20


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.ArgumentParser(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="the .safetensors file that qat/ptq.py has saved")
    parser.add_argument("--diff", metavar="OTHER", type=Path, help="show what differs in this one")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--all", action="store_true", help=f"list all differences, not the {SHOWN} largest of a kind")
    parser.add_argument("--trust-pickle", action="store_true", help="unpickle a .pth file: it can run code")
    arguments.add_logging_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Read, compare, print."""
    args = parse_arguments()
    common.set_up_logging(args)
    from lean.difference import compare

    artifacts = [read(path, args.trust_pickle) for path in (args.file, args.diff) if path]
    if args.diff:
        difference = compare(*artifacts)
        print(json.dumps(difference, indent=2) if args.json else difference_text(difference, args.all))
    else:
        print(json.dumps(content(artifacts[0]), indent=2) if args.json else description(args.file, artifacts[0]))


def read(path: Path, trust_pickle: bool) -> "Artifact":
    """Read a file of either form.

    Raises:
        InputError, QuantizationError: it can't be read.
        UsageError: it is a pickle, and not trusted, or holds no quantised model.
    """
    from lean.artifact import Artifact
    from lean.checked_file import holds_checked

    if not path.is_file():
        raise common.UsageError(f"file not found: {path}")
    if holds_checked(path):
        return Artifact.read(path)
    if not trust_pickle:
        raise common.UsageError(
            f"{path} is a pickle: name the .safetensors file beside it, or pass --trust-pickle if you trust its origin"
        )
    import torch

    from qat.inference import holds_whole_model, load_model

    model = load_model({}, path, torch.device("cpu")) if holds_whole_model(path) else None
    if not hasattr(model, "ptq"):
        raise common.UsageError(f"{path} holds no model that qat/ptq.py has saved")
    return Artifact.of(model, model.ptq)


def content(artifact: "Artifact") -> dict[str, Any]:
    """Everything but the weights, in plain types."""
    from lean.difference import amax_of, layer_properties

    return {
        "made_of": artifact.made_of,
        "layers": layer_properties(artifact),
        "amax": {name: amax.flatten().tolist() for name, amax in amax_of(artifact).items()},
        "structure": artifact.structure.to_dict(),
        "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in artifact.tensors.items()},
    }


def description(path: Path, artifact: "Artifact") -> str:
    """Two tables: what the model was made of, and its quantised layers."""
    from lean.difference import amax_of, layer_properties

    amax = amax_of(artifact)
    rows = []
    for state, (name, row) in zip(artifact.structure.layers, layer_properties(artifact).items(), strict=True):
        bits = "/".join(str(row[key]) for key in ("input bits", "weight bits") if key in row)
        ranges = [_range(amax.get(quantizer)) for quantizer in (state.input, state.weight)]
        shared = row["shares input scale with"].split(", ")
        more = f" +{len(shared) - 1}" if len(shared) > 1 else ""
        rows.append((name, row["kind"], row["state"], bits, *ranges, shared[0] + more))
    headers = ("layer", "kind", "state", "bits", "input amax", "weight amax", "shares input scale with")
    facts = tables.format_table(("property", "value"), summary(path, artifact))
    return f"{facts}\n{tables.format_table(headers, rows)}"


def summary(path: Path, artifact: "Artifact") -> list[tuple[str, str]]:
    """Name and value of what the model was made of."""
    made_of, layers = artifact.made_of, artifact.structure.layers
    disabled = {state.name for state in artifact.structure.quantizers if state.disabled}
    off = [layer.name for layer in layers if {layer.input, layer.weight} - {None} <= disabled]
    frames, checkpoint = made_of.get("calibration", {}), made_of.get("checkpoint", {})
    method = made_of.get("method", "-")
    methods = method if isinstance(method, str) else ", ".join(f"{k}: {v}" for k, v in method.items())
    return [
        ("file", tables.sized(path)),
        ("checkpoint", f"{checkpoint.get('file', '-')} (sha256 {checkpoint.get('sha256', '-')})"),
        ("layers", f"{len(layers)} quantised, {len(off)} of them left in float: {', '.join(off) or '-'}"),
        ("shared scales", f"{len(layers) - len({layer.input for layer in layers})} layers take another one's"),
        ("method", f"{methods}; weights: {made_of.get('weight_method', '-')}"),
        ("calibrator", f"{made_of.get('calibrator', '-')}, percentile {made_of.get('percentile', '-')}"),
        (
            "frames",
            f"{len(frames.get('tokens', []))}, pipeline {frames.get('pipeline', '-')}, seed {frames.get('seed', '-')} "
            f"(sha256 {frames.get('sha256', '-')})",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in made_of.get("versions", {}).items())),
    ]


def difference_text(difference: dict[str, Any], everything: bool) -> str:
    """A table for each kind of difference, and a line for each kind without one."""
    from lean.difference import is_empty

    if is_empty(difference):
        return "nothing differs"
    frames, amax, tensors = (difference[key] for key in ("frames", "amax", "tensors"))
    rows = [(name, _span(a), _span(b), f"{ratio:.4g}") for name, a, b, ratio in amax["changed"]]
    changed = [(name, f"{relative:.3g}") for name, relative in tensors["changed"]]
    changed += [(name, "only in the first") for name in tensors["only_first"]]
    changed += [(name, "only in the second") for name in tensors["only_second"]]
    same = "the same" if frames["same"] else f"{frames['common']} in common"
    limit = None if everything else SHOWN
    return "\n".join(
        [
            _section("what they are made of", ("key", "first", "second"), difference["made_of"], limit),
            f"frames: {frames['first']} and {frames['second']}, {same}",
            _section("layers", ("layer", "property", "first", "second"), difference["layers"], limit),
            _section(f"amax ({amax['equal']} equal)", ("quantizer", "first", "second", "ratio"), rows, limit),
            _section(f"tensors ({tensors['equal']} equal)", ("tensor", "relative difference"), changed, limit),
        ]
    )


def _section(title: str, headers: tuple[str, ...], rows: list, limit: int | None) -> str:
    if not rows:
        return f"{title}: no difference"
    more = f", the first {limit} (--all lists them)" if limit and len(rows) > limit else ""
    return f"{title}: {len(rows)} differ{more}\n{tables.format_table(headers, rows[:limit])}"


def _range(amax: Any) -> str:
    return "-" if amax is None else _span([amax.min().item(), amax.max().item()])


def _span(ends: list[float]) -> str:
    low, high = (f"{end:.4g}" for end in ends)
    return low if low == high else f"{low} .. {high}"


if __name__ == "__main__":
    common.run(main)
