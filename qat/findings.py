"""What quantisation changed on a few frames: noise by layer and branch, drift of the boxes, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bevfusion.data import FrameLoader, NuScenesDataset, to_device
from bevfusion.evaluation import Boxes, Drift, measure_drift
from lean.cost import measure_costs
from lean.report.rows import decibels
from lean.sqnr import Noise, measure_noise, output_module
from lean.switches import quantized_layers
from qat import pictures
from qat.inference import evaluation_dataset, spread

PICTURES = 2  # frames that are drawn
# measure of a drift -> heading, decimals, factor
MEASURES = {
    "boxes": ("Boxes", 0, 1),
    "score_recall": ("Found again (%)", 1, 100),
    "centre": ("Centre (m)", 3, 1),
    "size": ("Size (1 - IoU)", 3, 1),
    "yaw": ("Yaw (rad)", 3, 1),
    "velocity": ("Velocity (m/s)", 3, 1),
    "score_change": ("Score", 3, 1),
}
DRIFT_NOTE = (
    "On {frames} frames: the float model's 200 best boxes of each, paired with the quantised model's boxes of the same "
    "class within 2 m. Shares and mean differences are weighted by score."
)


@dataclass(frozen=True)
class Findings:
    """Results of both models on some frames.

    Attributes:
        noise: by layer. outputs: by branch. macs: by layer, in the first of the frames.
        before, after: results of the float and of the quantised model.
    """

    dataset: NuScenesDataset
    frames: Sequence[int]
    noise: Mapping[str, Noise]
    outputs: Mapping[str, Noise]
    macs: Mapping[str, int]
    before: Sequence[Mapping[str, Any]]
    after: Sequence[Mapping[str, Any]]

    def sections(self) -> dict[str, Any]:
        """The sections of a report that come from the frames, see `lean.report.schema`; not the layers' own."""
        return {
            "measured": [self.dataset.data_infos[index].token for index in self.frames],
            "branches": [{"path": path, "sqnr": decibels(noise)} for path, noise in self.outputs.items()],
            **detections(self.dataset, self.frames, self.before, self.after),
        }


def detections(
    dataset: NuScenesDataset, frames: Sequence[int], before: Sequence[Mapping], after: Sequence[Mapping]
) -> dict[str, Any]:
    """The sections of a report that come from the results of both models: drift and pictures."""
    chosen = spread(len(frames), PICTURES)
    pairs = zip(before, after, strict=True)
    drifts = (measure_drift(Boxes.of(a), Boxes.of(b), len(dataset.CLASSES)) for a, b in pairs)
    drift = sum(drifts, Drift.none(len(dataset.CLASSES))).to_dict(dataset.CLASSES)
    drawn = ([some[index] for index in chosen] for some in (frames, before, after))
    return {
        "drift": drift_section(drift, len(frames)),
        "colours": pictures.class_colours(dataset.CLASSES),
        "pictures": pictures.compare(dataset, *drawn),
    }


def report_dataset(cfg: Mapping[str, Any]) -> NuScenesDataset:
    """The frames to measure on: the validation frames, or where there is no info file of these, the training frames.

    Raises:
        InputError: the data can't be used.
    """
    return evaluation_dataset(cfg, "val" if Path(cfg["data"]["val"]["ann_file"]).exists() else "train")


def measure(
    model: nn.Module, branches: Sequence[str], dataset: NuScenesDataset, count: int, device: torch.device, workers: int
) -> Findings:
    """Run the quantised model on `count` frames, in floating point (all quantizers off) and as it is.

    Raises:
        InputError: a frame can't be read.
        QuantizationError: a quantizer isn't calibrated.
    """
    frames = spread(len(dataset), count)
    layers = quantized_layers(model).values()
    results: dict[bool, list] = {True: [], False: []}

    def forward(network: nn.Module, batch: Mapping[str, Any]) -> None:
        is_float = all(layer.is_disabled for layer in layers)
        results[is_float] += network(**to_device(batch, device))

    first = to_device(next(iter(FrameLoader(dataset, 1, 0, sampler=frames[:1]))), device)
    costs = measure_costs(model, lambda: model(**first))
    modules = {path: output_module(model, path) for path in branches}
    batches = tqdm(FrameLoader(dataset, 1, workers, sampler=frames), "report", len(frames), unit="frame", disable=None)
    measured = measure_noise(model, batches, forward, outputs=tuple(dict.fromkeys(modules.values())))
    outputs = {path: measured.outputs[name] for path, name in modules.items() if name in measured.outputs}
    macs = {name: int(cost.macs) for name, cost in costs.items()}
    return Findings(dataset, frames, measured.layers["both"], outputs, macs, results[True], results[False])


def drift_section(drift: Mapping[str, Any], frames: int) -> dict[str, Any]:
    """The section `drift` of a report, from `Drift.to_dict` over so many frames."""
    groups = [{"title": "By class", "rows": [_row("all", drift)]}, {"title": "By distance", "rows": []}]
    for group, key in zip(groups, ("by_class", "by_range"), strict=True):
        group["rows"] += [_row(name, values) for name, values in drift[key].items() if values["boxes"]]
    columns = [{"title": title, "digits": digits} for title, digits, _ in MEASURES.values()]
    return {"note": DRIFT_NOTE.format(frames=frames), "columns": columns, "groups": groups}


def _row(name: str, values: Mapping[str, float | None]) -> dict[str, Any]:
    scaled = [None if values[key] is None else factor * values[key] for key, (*_, factor) in MEASURES.items()]
    return {"name": name, "values": scaled}
