"""Options of the export scripts; importing it costs nothing."""

import argparse
from pathlib import Path

from qat import arguments

DEFAULT_CKPT = "qat/ckpt/bevfusion_ptq.pth"


def parse_arguments(description: str | None, layernorm: bool = False, inverse: bool = False) -> argparse.Namespace:
    """Read the command line of an export script.

    Args:
        layernorm, inverse: whether the script has `--layernorm-plugin`, `--inverse`.
    """
    parser = arguments.ArgumentParser(description)
    parser.set_defaults(dataset_root=None)
    parser.add_argument("--ckpt", metavar="FILE", default=DEFAULT_CKPT, help="model that qat/ptq.py has saved")
    parser.add_argument("--fp16", action="store_true", help="leave all quantizers out; works with float checkpoints")
    parser.add_argument(
        "--out", "--save", metavar="DIR", type=Path, help="output folder (default: qat/onnx_int8 or qat/onnx_fp16)"
    )
    parser.add_argument(
        "--typing",
        choices=("strong", "weak"),
        default="strong",
        help="strong: FP16 tensors, for TensorRT 10 --stronglyTyped and TensorRT 11; weak: float32 tensors, for "
        "TensorRT 8.5 to 10 with --int8 --fp16",
    )
    if layernorm:
        parser.add_argument(
            "--layernorm-plugin", action="store_true", help="write layer normalisations as the runtime's plugin node"
        )
    if inverse:
        parser.add_argument("--inverse", action="store_true", help="write lidar.backbone.zyx.onnx as well")
    parser.add_argument("--config", metavar="FILE", help="YAML config; a quantised model brings its own")
    parser.add_argument(
        "--cfg-options", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override config keys"
    )
    arguments.add_logging_arguments(parser)
    return parser.parse_args()
