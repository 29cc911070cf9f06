#!/usr/bin/env python3
"""Export fuser.onnx and head.bbox.onnx alone; qat/export.py writes all files."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from qat import common
from qat.export_options import parse_arguments


def main() -> None:
    """Load, write, say what runs in which precision."""
    args = parse_arguments(__doc__, layernorm=True)
    common.set_up_logging(args)
    from lean.export.dense import export_transfuser
    from qat import exporting

    exporting.check_folder(args)
    exporting.write_all(exporting.load_for_export(args), args, (export_transfuser,))


if __name__ == "__main__":
    common.run(main)
