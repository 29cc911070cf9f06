"""The layers of the model: a map coloured by SQNR, and a table with all that is known of each."""

from itertools import groupby
from typing import Any

from lean.report.html import (
    DASH,
    TIMES,
    Html,
    Section,
    breakable,
    element,
    number,
    percent,
    scaled,
    section,
    significant,
)

LEVELS = ((10, "q0", "below 10 dB"), (20, "q1", "10 to 20"), (30, "q2", "20 to 30"), (40, "q3", "30 to 40"))
BEST = ("q4", "40 dB and more")
OFF, UNKNOWN = ("off", "float"), ("na", "not measured")
STATE_WORDS = {"int8": "INT8", "disabled": "float, disabled", "float": "float"}


def quality(layer: dict[str, Any]) -> str:
    """Class of a layer's colour."""
    if layer["state"] != "int8":
        return OFF[0]
    if layer["sqnr"] is None:
        return UNKNOWN[0]
    return next((name for limit, name, _ in LEVELS if layer["sqnr"] < limit), BEST[0])


def stage(layer: dict[str, Any]) -> str:
    """Part of a branch that a layer belongs to: up to two words of its path, numbers left out."""
    path = layer["name"].removeprefix(layer["branch"]).strip(".").split(".")[:-1]
    return ".".join([word for word in path if not word.isdigit()][:2])


def map_section(report: dict[str, Any]) -> list[Section]:
    """A tile for each layer, in the order of the model."""
    layers = report.get("layers") or []
    if not layers:
        return []
    sqnr = {branch["path"]: branch["sqnr"] for branch in report.get("branches") or []}
    branches = []
    for path, members in groupby(layers, key=lambda layer: layer["branch"]):
        stages = [_stage(name, list(tiles)) for name, tiles in groupby(members, key=stage)]
        output = sqnr.get(path)
        words = None if output is None else element("span", f" output {number(output, 1)} dB", class_="detail")
        branches.append(
            element("div", element("h3", path, words), element("div", *stages, class_="stages"), class_="branch")
        )
    note = "Each tile is a layer with the SQNR of its output in dB. Pick one to see its row below."
    return section("map", "Map of the model", element("p", note), _legend(), *branches)


def _stage(name: str, layers: list[dict]) -> Html:
    title = element("p", name, class_="stage-name") if name else None
    return element("div", title, element("div", *(_tile(layer) for layer in layers), class_="tiles"), class_="stage")


def _tile(layer: dict[str, Any]) -> Html:
    words = STATE_WORDS[layer["state"]] if layer["state"] != "int8" else f"{number(layer['sqnr'], 1)} dB"
    text = "F" if layer["state"] != "int8" else "?" if layer["sqnr"] is None else f"{layer['sqnr']:.0f}"
    label = f"{layer['name']}, {words}"
    return element(
        "button",
        text,
        class_=f"tile {quality(layer)}",
        type="button",
        data_pick=layer["name"],
        title=label,
        aria_label=label,
    )


def _legend() -> Html:
    keys = [*((name, words) for _, name, words in LEVELS), BEST, OFF, UNKNOWN]
    items = [element("li", element("span", class_=f"tile {name}", aria_hidden="true"), words) for name, words in keys]
    return element("ul", *items, class_="legend", aria_label="Colours")


# title, key to sort by, class that says how soon a narrow screen hides it
COLUMNS = (
    ("Layer", "name", ""),
    ("Kind", "kind", "c2"),
    ("Weight shape", "size", "c2 n"),
    ("Bits", "bits", "c2 n"),
    ("amax", "amax", "c1 n"),
    ("Clipped", "clipped", "c1 n"),
    ("SQNR (dB)", "sqnr", "n"),
    ("MACs", "macs", "c1 n"),
    ("State", "state", "c1"),
)


def layers_section(report: dict[str, Any]) -> list[Section]:
    """All layers, the worst first; the page's script sorts, filters and opens them."""
    layers = report.get("layers") or []
    if not layers:
        return []
    quantizers = report.get("quantizers") or {}
    unmeasured = [layer for layer in layers if layer["sqnr"] is None]
    measured = sorted((layer for layer in layers if layer["sqnr"] is not None), key=lambda layer: layer["sqnr"])
    ordered = [layer for layer in [*measured, *unmeasured] if layer["state"] == "int8"]
    ordered += [layer for layer in [*measured, *unmeasured] if layer["state"] != "int8"]
    head = element("tr", *(_head(*column) for column in COLUMNS))
    rows = [_row(layer, quantizers.get(layer["quantizer"]) or {}) for layer in ordered]
    content = element(
        "table",
        element("caption", "Layers of the model", class_="hidden"),
        element("thead", head),
        element("tbody", *rows),
        id="layer-table",
    )
    note = "The worst come first. Open a layer to see what reached it in calibration, and what other ranges would cost."
    scroll = element("div", content, class_="scroll", tabindex="0", role="region", aria_label="Layers of the model")
    return section("layers", "Layers", element("p", note), _controls(layers), scroll)


def _controls(layers: list[dict]) -> Html:
    branches = dict.fromkeys(layer["branch"] for layer in layers)
    options = [element("option", "all branches", value=""), *(element("option", b, value=b) for b in branches)]
    states = [element("option", "all states", value="")]
    states += [element("option", words, value=state) for state, words in STATE_WORDS.items()]
    return element(
        "div",
        element("label", "Search ", element("input", type="search", id="search", placeholder="name, kind, reason")),
        element("label", "Branch ", element("select", *options, id="branch")),
        element("label", "State ", element("select", *states, id="state")),
        element("p", f"{len(layers)} of {len(layers)} layers", id="count", role="status"),
        class_="controls",
    )


def _head(title: str, key: str, kind: str) -> Html:
    button = element("button", title, type="button", data_sort=key)
    return element("th", button, scope="col", class_=kind or None, aria_sort="ascending" if key == "sqnr" else "none")


def _row(layer: dict[str, Any], quantizer: dict[str, Any]) -> Html:
    name = element(
        "button", element("span", breakable(layer["name"])), type="button", class_="open", aria_expanded="false"
    )
    values = {
        "kind": layer["kind"],
        "size": TIMES.join(map(str, layer["shape"])) if layer["shape"] else DASH,
        "bits": DASH if layer["bits"] is None else str(layer["bits"]),
        "amax": significant(layer["amax"]),
        "clipped": percent(quantizer.get("clipped")),
        "sqnr": element("span", number(layer["sqnr"], 1), class_=f"chip {quality(layer)}"),
        "macs": scaled(layer["macs"]),
        "state": STATE_WORDS[layer["state"]],
    }
    cells = [element("td", values[key], class_=kind or None) for _, key, kind in COLUMNS[1:]]
    return element("tr", element("th", name, scope="row"), *cells, class_="layer", **_data(layer, quantizer))


def _data(layer: dict[str, Any], quantizer: dict[str, Any]) -> dict[str, object]:
    """What the script sorts, filters and shows by, as attributes."""
    count = 1
    for extent in layer["shape"] or [0]:
        count *= extent
    plain = {
        key: layer[key]
        for key in ("name", "branch", "kind", "state", "bits", "amax", "sqnr", "macs", "why", "quantizer")
    }
    plain["shape"] = TIMES.join(map(str, layer["shape"])) if layer["shape"] else ""
    plain |= {"size": count or None, "clipped": quantizer.get("clipped"), "shared": ", ".join(layer["shared_with"])}
    if layer["weight_amax"]:
        plain["weight"] = " … ".join(significant(value) for value in layer["weight_amax"])
    return {f"data_{key}": "" if value is None else value for key, value in plain.items()}
