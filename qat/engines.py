#!/usr/bin/env python3
"""Build TensorRT engines from the exported dense ONNX files with trtexec."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide the standard library's

import argparse
import shlex
import shutil

from qat import arguments, common, tables


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.ArgumentParser(__doc__)
    parser.add_argument("--onnx", metavar="DIR", type=Path, required=True, help="folder that qat/export.py wrote")
    parser.add_argument("--trtexec", metavar="PATH", default="trtexec", help="TensorRT's trtexec")
    parser.add_argument(
        "--trt", type=int, choices=(8, 10, 11), help="major version of TensorRT (default: asked of trtexec)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the engines (default: build/ in --onnx)")
    parser.add_argument(
        "--plugin", metavar="FILE", type=Path, help="library of the plugins, for files exported with --layernorm-plugin"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    arguments.add_logging_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Choose the commands, run what is not up to date, show the precisions of the layers."""
    args = parse_arguments()
    common.set_up_logging(args)
    from lean.export.trtexec import ENGINES, VERSIONS, Network, build, build_command, layer_precisions, trtexec_version

    found = shutil.which(args.trtexec)
    if found is None and not (args.dry_run and args.trt):
        raise common.UsageError(f"--trtexec {args.trtexec}: no such program; name TensorRT's trtexec")
    trtexec = Path(found or args.trtexec)
    networks = [Network.read(args.onnx / f"{name}.onnx") for name in ENGINES]
    version = args.trt or trtexec_version(trtexec)
    if version not in VERSIONS:
        raise common.UsageError(f"TensorRT {version} is not known here; known: {', '.join(map(str, VERSIONS))}")
    folder = args.out or args.onnx / "build"
    engines = [folder / f"{name}.plan" for name in ENGINES]
    commands = [
        build_command(network, version, trtexec, engine, args.plugin)
        for network, engine in zip(networks, engines, strict=True)
    ]
    if args.dry_run:
        print(*map(shlex.join, commands), sep="\n")
        return
    rows = []
    for network, command, engine in zip(networks, commands, engines, strict=True):
        built = build(network, command, engine)
        counts = layer_precisions(engine)
        layers = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "-"
        rows.append((engine.name, "built" if built else "up to date", f"{engine.stat().st_size / 2**20:.1f}", layers))
    print(f"TensorRT {version}, engines in {folder}")
    print(tables.format_table(("engine", "state", "MiB", "layers by input type"), rows, right=("MiB",)))


if __name__ == "__main__":
    common.run(main)
