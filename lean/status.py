"""What became of each quantised layer, as rows and as a table."""

from dataclasses import dataclass

from torch import Tensor, nn

from lean.sharing import sharing_groups
from lean.switches import quantized_layers, unwrap


@dataclass(frozen=True)
class LayerStatus:
    """State of one quantised layer.

    Attributes:
        kind: class name of the layer.
        disabled: whether it computes in floating point.
        input_amax: amax of its input, None before calibration.
        weight_amax: least and largest amax of its weight's channels, None without weight or before calibration.
        shared_with: the other layers that have the same input quantizer.
    """

    name: str
    kind: str
    disabled: bool
    input_amax: float | None
    weight_amax: tuple[float, float] | None
    shared_with: tuple[str, ...]


def layer_status(model: nn.Module) -> list[LayerStatus]:
    """Return the state of every quantised layer, in module order."""
    groups = {name: group for group in sharing_groups(unwrap(model)) for name in group}
    rows = []
    for name, layer in quantized_layers(model).items():
        weight = _range(layer._weight_quantizer.amax) if hasattr(layer, "_weight_quantizer") else None
        inputs = _range(layer._input_quantizer.amax)
        shared = tuple(other for other in groups.get(name, ()) if other != name)
        rows.append(LayerStatus(name, type(layer).__name__, layer.is_disabled, inputs and inputs[1], weight, shared))
    return rows


def quantizer_table(model: nn.Module) -> str:
    """Return a table of the quantised layers: name, kind, state, amax of input and weight, sharing."""
    head = ("layer", "kind", "state", "input amax", "weight amax", "shares input scale with")
    rows = [head, *(_cells(row) for row in layer_status(model))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cells(row: LayerStatus) -> tuple[str, ...]:
    weight = "-" if row.weight_amax is None else f"{row.weight_amax[0]:.4g} .. {row.weight_amax[1]:.4g}"
    inputs = "-" if row.input_amax is None else f"{row.input_amax:.4g}"
    shared = row.shared_with[0] if row.shared_with else "-"
    more = f" +{len(row.shared_with) - 1}" if len(row.shared_with) > 1 else ""
    return row.name, row.kind, "float" if row.disabled else "int8", inputs, weight, shared + more


def _range(amax: Tensor | None) -> tuple[float, float] | None:
    return None if amax is None else (amax.min().item(), amax.max().item())
