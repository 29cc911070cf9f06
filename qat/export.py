#!/usr/bin/env python3
"""Export a quantised model to the five ONNX files that the CUDA runtime of BEVFusion reads."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from qat import common, tables
from qat.export_options import parse_arguments


def main() -> None:
    """Load, write all parts or none, say what runs in which precision."""
    args = parse_arguments(__doc__, layernorm=True, inverse=True)
    common.set_up_logging(args)
    steps = tables.Steps()
    with steps.step("import"), common.importing():
        from lean.export.dense import export_camera, export_transfuser
        from lean.export.sparse import export_lidar
        from qat import exporting

    exporting.check_folder(args)

    def write_lidar(model, folder, options):
        backbone = model.encoders["lidar"]["backbone"]
        for order in ("xyz", "zyx")[: 1 + args.inverse]:
            file = folder / f"lidar.backbone.{order}.onnx"
            voxels = exporting.example_voxels(model)
            export_lidar(backbone, file, voxels=voxels, fp16=options.fp16, inverse=order == "zyx")
        return []

    with steps.step("load"):
        model = exporting.load_for_export(args)
    with steps.step("export"):
        exporting.write_all(model, args, (export_camera, write_lidar, export_transfuser))
    print(steps.table())


if __name__ == "__main__":
    common.run(main)
