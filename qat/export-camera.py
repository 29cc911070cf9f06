#!/usr/bin/env python3
"""Export camera.backbone.onnx and camera.vtransform.onnx alone; qat/export.py writes all files."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from qat import common
from qat.export_options import parse_arguments


def main() -> None:
    """Load, write, say what runs in which precision."""
    args = parse_arguments(__doc__)
    common.set_up_logging(args)
    from lean.export.dense import export_camera
    from qat import exporting

    exporting.check_folder(args)
    exporting.write_all(exporting.load_for_export(args), args, (export_camera,))


if __name__ == "__main__":
    common.run(main)
