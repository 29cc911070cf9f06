"""Head of the page: what was quantised, and what it cost."""

from typing import Any

from lean.report.html import Html, Section, breakable, element, joined, number, percent, scaled, section, size


def header(report: dict[str, Any]) -> Html:
    """Title and one line that says what the page is about."""
    runs = report["runs"]
    words = [f"{len(report['layers'])} layers" if report.get("layers") else None, runs[-1]["device"] if runs else None]
    line = " · ".join(["Post-training INT8 quantisation of BEVFusion", *filter(None, words)])
    return element("header", element("h1", report["title"]), element("p", line))


def summary_section(report: dict[str, Any]) -> list[Section]:
    """Cards with the numbers that one asks for first."""
    cards = [*_score_cards(report), *_layer_cards(report), *_size_cards(report), *_time_cards(report)]
    return section("summary", "Summary", element("ul", *cards, class_="cards")) if cards else []


def pair(scores: list[dict] | None) -> tuple[dict | None, dict | None]:
    """The scores of the float and of the INT8 model, None where there are none; the latest count."""
    found = {one["role"]: one for one in scores or []}
    return found.get("float"), found.get("int8")


def with_unit(value: str, unit: str) -> Html:
    """A value with its unit in smaller letters."""
    return joined([value, " ", element("small", unit)])


def _card(title: str, value: object, *details: object, tone: str | None = None) -> Html:
    lines = [element("p", detail, class_="detail") for detail in details if detail]
    return element("li", element("p", title, class_="label"), element("p", value, class_="value"), *lines, class_=tone)


def _score_cards(report: dict[str, Any]) -> list[Html]:
    before, after = pair(report.get("scores"))
    cards = []
    for title, key in (("mAP", "mean_ap"), ("NDS", "nds")):
        if before and after:
            change = 100 * (after[key] - before[key])
            words = f"{number(100 * before[key])} in FP32 → {number(100 * after[key])} in INT8"
            tone = "good" if change > -0.1 else "fair" if change > -0.5 else "poor"
            cards.append(
                _card(f"{title}, change", with_unit(number(change, 2, signed=True), "points"), words, tone=tone)
            )
        elif one := before or after:
            cards.append(_card(title, with_unit(number(100 * one[key]), "%"), "FP32 only" if before else "INT8 only"))
    return cards


def _layer_cards(report: dict[str, Any]) -> list[Html]:
    layers = report.get("layers") or []
    if not layers:
        return []
    inside = [layer for layer in layers if layer["state"] == "int8"]
    states = {s: sum(layer["state"] == s for layer in layers) for s in ("disabled", "float")}
    rest = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    cards = [_card("Layers in INT8", f"{len(inside)} of {len(layers)}", rest)]
    macs = {
        s: sum(layer["macs"] or 0 for layer in layers if layer["state"] == s) for s in ("int8", "disabled", "float")
    }
    if total := sum(macs.values()):
        able = macs["int8"] + macs["disabled"]
        part = f"{percent(macs['int8'] / able)} of what can be quantised" if able else None
        cards.append(
            _card("Multiplications in INT8", percent(macs["int8"] / total), f"of {scaled(total)} a frame", part)
        )
    measured = [layer for layer in inside if layer["sqnr"] is not None]
    if measured:
        worst = min(measured, key=lambda layer: layer["sqnr"])
        cards.append(
            _card(
                "Worst layer",
                with_unit(number(worst["sqnr"], 1), "dB"),
                element("a", breakable(worst["name"]), href="#layers", data_pick=worst["name"]),
            )
        )
    return cards


def _size_cards(report: dict[str, Any]) -> list[Html]:
    sizes: dict[str, dict] = {}
    for file in report.get("files") or []:
        sizes.setdefault(file["role"], file)
    weights = _weight_sizes(report.get("layers") or [])
    lines = [f"{'FP32' if role == 'float' else 'INT8'} file: {size(file['bytes'])}" for role, file in sizes.items()]
    if not weights:
        return [_card("Size", lines[0].partition(": ")[2], *lines)] if lines else []
    before, after = weights
    value = with_unit(f"{before / 2**20:.1f} → {after / 2**20:.1f}", "MiB")
    return [_card("Weights of these layers", value, "in FP32, and in INT8 and FP16", *lines)]


def _weight_sizes(layers: list[dict]) -> tuple[float, float] | None:
    """Bytes of all layers' weights in FP32, and as deployed: a byte each in INT8, two where a layer stays float."""
    before = after = 0.0
    for layer in layers:
        count = 1
        for extent in layer["shape"] or [0]:
            count *= extent
        before += 4 * count
        after += count * (layer["bits"] or 8) / 8 if layer["state"] == "int8" else 2 * count
    return (before, after) if before else None


def _time_cards(report: dict[str, Any]) -> list[Html]:
    seconds = [step["seconds"] for run in report["runs"] for step in run["steps"]]
    if not seconds:
        return []
    scripts = ", ".join(dict.fromkeys(run["script"] for run in report["runs"]))
    return [_card("Time", with_unit(f"{sum(seconds):.1f}", "s"), scripts)]
