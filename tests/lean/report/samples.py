"""A report with every section, of the tiny model; its texts try to break out of the page."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from lean.bevfusion_recipe import default_recipe
from lean.calibrate import calibrate_weights, observe, observing
from lean.fold import fold_dense, fold_sparse
from lean.histogram import Histogram
from lean.insert import insert_quantizers
from lean.ranges import set_amax
from lean.report.charts import charts
from lean.report.rows import decibels, layer_rows
from lean.report.schema import FORMAT, VERSION
from lean.sqnr import Measured, measure_noise
from lean.switches import disable_layers, named_quantizers
from tests.lean.tiny import TinyFusion, batch, run

EVIL = "</script><img src=x onerror=\"document.title='broken'\">'&lt;"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJg"
    "gg=="
)
REASON = "the recipe disables it"


@cache
def calibrated() -> tuple[TinyFusion, Mapping[str, Histogram], Measured]:
    """The tiny model, quantised and calibrated on one batch, its statistics and its noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyFusion()
    recipe = default_recipe(model)
    insert_quantizers(model, recipe)
    fold_sparse(model)
    fold_dense(model)
    with observing(model) as observers:
        observe(model, [batch(0)], 1, run, after_batch=lambda number, one: None)
        statistics = observers.statistics()
    calibrate_weights(model)
    set_amax(model, statistics, "mse")
    disable_layers(model, recipe.disable)
    return model, statistics, measure_noise(model, [batch(0)], run, outputs=BRANCHES)


BRANCHES = ("encoders.camera.vtransform", "encoders.lidar.backbone", "fuser", "decoder")


def layers() -> list[dict[str, Any]]:
    """The rows of the tiny model."""
    model, _, measured = calibrated()
    branches = [branch.path for branch in default_recipe(model).branches]
    return layer_rows(
        model, branches, {REASON: default_recipe(model).disable}, measured.layers["both"], {"fuser.0": 99}
    )


def scores(role: str, mean_ap: float) -> dict[str, Any]:
    """Scores of a model with one class that has an unprintable name."""
    errors = {"trans_err": 0.3, "scale_err": 0.2, "orient_err": None, "vel_err": 0.1, "attr_err": 0.5}
    return {
        "name": f"{role}{EVIL}",
        "role": role,
        "frames": 4,
        "mean_ap": mean_ap,
        "nds": 0.5,
        "tp_errors": errors,
        "class_aps": {EVIL: mean_ap, "car": 0.9},
        "class_tp_errors": {EVIL: errors, "car": errors},
        "truth_counts": {EVIL: 3, "car": 20},
    }


def report() -> dict[str, Any]:
    """A report with all sections."""
    model, statistics, measured = calibrated()
    rows = layers()
    rows[-1]["why"] = EVIL
    run_entry = {
        "script": "qat/ptq.py",
        "command": f"python qat/ptq.py --ckpt '{EVIL}'",
        "device": EVIL,
        "steps": [{"name": EVIL, "seconds": 1.5, "peak_mib": 12.0}],
        "versions": {"torch": "2.14", EVIL: "1"},
        "settings": {"amax of inputs": EVIL},
    }
    drift_rows = [{"name": EVIL, "values": [3.0, None]}, {"name": "car", "values": [20.0, 0.01]}]
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": EVIL,
        "runs": [run_entry],
        "files": [{"role": role, "name": EVIL, "bytes": 5000, "sha256": 8 * letter} for role, letter in FILES.items()],
        "calibration": {"pipeline": EVIL, "seed": 0, "tokens": [EVIL, "b"]},
        "measured": [EVIL],
        "branches": [{"path": path, "sqnr": decibels(measured.outputs[path])} for path in BRANCHES],
        "layers": rows,
        "quantizers": charts(statistics, named_quantizers(model)),
        "scores": [scores("float", 0.71), scores("int8", 0.70)],
        "drift": {
            "note": EVIL,
            "columns": [{"title": "Boxes", "digits": 0}, {"title": EVIL, "digits": 3}],
            "groups": [{"title": EVIL, "rows": drift_rows}],
        },
        "tables": [
            {
                "id": "sensitivity",
                "title": EVIL,
                "note": EVIL,
                "columns": [{"title": EVIL, "digits": None}, {"title": "SQNR", "digits": 1}],
                "rows": [[EVIL, 3.14], ["b", None]],
            }
        ],
        "pictures": [
            {
                "token": EVIL,
                "note": EVIL,
                "views": [{"title": EVIL, "float": PIXEL, "int8": PIXEL, "width": 1, "height": 1}],
            }
        ],
        "colours": {EVIL: "#ff8800"},
        "notes": [EVIL],
    }


FILES = {"float": "a", "int8": "b"}
