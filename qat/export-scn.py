#!/usr/bin/env python3
"""Export the LiDAR branch alone, as lidar.backbone.xyz.onnx or .zyx.onnx; qat/export.py writes all files."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from qat import arguments, common, tables
from qat.export_options import DEFAULT_CKPT


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.ArgumentParser(__doc__)
    parser.set_defaults(dataset_root=None)
    parser.add_argument("--ckpt", metavar="FILE", default=DEFAULT_CKPT, help="model that qat/ptq.py has saved")
    parser.add_argument("--fp16", action="store_true", help="leave all quantizers out; works with float checkpoints")
    parser.add_argument(
        "--save",
        metavar="FILE",
        type=Path,
        help="name of the file; its ending becomes .xyz.onnx or .zyx.onnx (default: lidar.backbone.onnx in "
        "qat/onnx_int8 or qat/onnx_fp16)",
    )
    parser.add_argument("--inverse", action="store_true", help="write the form for voxels in the order z, y, x")
    parser.add_argument(
        "--in-channel", metavar="N", type=arguments.positive, help="features of a point, checked against the model's"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML config; a quantised model brings its own")
    parser.add_argument(
        "--cfg-options", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override config keys"
    )
    arguments.add_logging_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Load, write, say where."""
    args = parse_args()
    common.set_up_logging(args)
    from lean.export.sparse import export_lidar
    from lean.files import check_writable
    from qat import exporting

    save = args.save or Path("qat") / ("onnx_fp16" if args.fp16 else "onnx_int8") / "lidar.backbone.onnx"
    file = save.with_name(f"{save.name.removesuffix('.onnx')}.{'zyx' if args.inverse else 'xyz'}.onnx")
    check_writable(file, "--save")
    model = exporting.load_for_export(args)
    features, coordinates = exporting.example_voxels(model)
    if args.in_channel not in (None, features.shape[1]):
        raise common.UsageError(f"--in-channel {args.in_channel}: the model reads {features.shape[1]} features a point")
    backbone = model.encoders["lidar"]["backbone"]
    export_lidar(backbone, file, voxels=(features, coordinates), fp16=args.fp16, inverse=args.inverse)
    print(f"wrote {tables.sized(file)}")


if __name__ == "__main__":
    common.run(main)
