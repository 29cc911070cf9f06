"""What the model detects before and after: official scores, drift of boxes, pictures, further tables."""

from typing import Any

from lean.report.html import DASH, Html, Section, as_html, breakable, element, number, section, significant, table
from lean.report.summary import pair

TP_ERRORS = {
    "trans_err": "Position (mATE, m)",
    "scale_err": "Size (mASE, 1 - IoU)",
    "orient_err": "Orientation (mAOE, rad)",
    "vel_err": "Velocity (mAVE, m/s)",
    "attr_err": "Attribute (mAAE, 1 - accuracy)",
}
ARROW = " \N{RIGHTWARDS ARROW} "
HEAD = {"float": "FP32", "int8": "INT8"}


def scores_section(report: dict[str, Any]) -> list[Section]:
    """Official metrics, overall and by class; a column a model and the difference."""
    models = [one for one in pair(report.get("scores")) if one]
    if not models:
        return []
    heads = [HEAD[one["role"]] for one in models] + (["Change"] if len(models) == 2 else [])
    rows = [
        _row(t, [100 * one[key] for one in models], 2, True) for t, key in (("mAP (%)", "mean_ap"), ("NDS (%)", "nds"))
    ]
    rows += [_row(title, [one["tp_errors"].get(key) for one in models], 3, False) for key, title in TP_ERRORS.items()]
    classes = [
        [breakable(name), str(count), *_row("", [100 * one["class_aps"][name] for one in models], 2, True)[1:]]
        for name, count in models[0]["truth_counts"].items()
    ]
    frames = f"Official nuScenes metrics over {models[0]['frames']} frames. "
    note = element(
        "p", frames, "Errors are means over true positives: less is better. Very few frames make them noisy."
    )
    overall = table(["Metric", *heads], rows, "Scores of both models")
    by_class = table(
        ["Class", "Boxes", *heads],
        classes,
        "Average precision by class, in per cent",
    )
    halves = [
        element("div", element("h3", title), content)
        for title, content in (("Overall", overall), ("AP by class (%)", by_class))
    ]
    return section("scores", "Detection scores", note, element("div", *halves, class_="halves"), _class_errors(models))


def _class_errors(models: list[dict[str, Any]]) -> Html:
    """The true-positive errors of each class, folded up; of two models as before and after."""
    rows = [
        [
            breakable(name),
            *(_before_after([one["class_tp_errors"][name].get(key) for one in models]) for key in TP_ERRORS),
        ]
        for name in models[0]["class_tp_errors"]
    ]
    words = f" ({ARROW.join(HEAD[one['role']] for one in models)})" if len(models) == 2 else ""
    content = table(["Class", *TP_ERRORS.values()], rows, "True-positive errors by class")
    return element("details", element("summary", f"True-positive errors by class{words}"), content)


def _before_after(values: list[float | None]) -> str:
    return DASH if values == [None] * len(values) else ARROW.join(number(value, 3) for value in values)


def _row(title: str, values: list[float | None], digits: int, more_is_better: bool) -> list[object]:
    row: list[object] = [title, *(number(value, digits) for value in values)]
    if len(values) == 2:
        row.append(DASH if None in values else change(values[1] - values[0], digits, more_is_better))
    return row


def change(value: float, digits: int, more_is_better: bool) -> Html:
    """A signed difference, marked as better or worse if it shows in these digits."""
    text = number(value, digits, signed=True)
    if round(value, digits) == 0:
        return element("span", number(0, digits))
    better = (value > 0) == more_is_better
    return element("span", text, class_="better" if better else "worse", title="better" if better else "worse")


def drift_section(report: dict[str, Any]) -> list[Section]:
    """How far the boxes moved from those of the float model, by class and by range."""
    drift = report.get("drift")
    if not drift:
        return []
    columns = [column["title"] for column in drift["columns"]]
    digits = [column["digits"] for column in drift["columns"]]
    groups = []
    for group in drift["groups"]:
        rows = [[breakable(row["name"]), *map(number, row["values"], digits)] for row in group["rows"]]
        groups.append(
            element("div", element("h3", group["title"]), table(["", *columns], rows, f"Drift: {group['title']}"))
        )
    return section("drift", "Drift of the boxes", element("p", drift["note"]), *groups)


def tables_sections(report: dict[str, Any]) -> list[Section]:
    """Further tables, each a section."""
    found = []
    for one in report.get("tables") or []:
        titles = [column["title"] for column in one["columns"]]
        rows = [
            [_cell(cell, column["digits"]) for cell, column in zip(row, one["columns"], strict=False)]
            for row in one["rows"]
        ]
        words = next((i for i, column in enumerate(one["columns"]) if column["digits"] is not None), len(titles))
        found += section(
            f"table-{one['id']}", one["title"], element("p", one["note"]), table(titles, rows, one["title"], words)
        )
    return found


def _cell(cell: object, digits: int | None) -> str:
    if isinstance(cell, str):
        return breakable(cell)
    return significant(cell) if digits is None else number(cell, digits)


def pictures_section(report: dict[str, Any]) -> list[Section]:
    """Frames with what both models find, side by side."""
    frames = []
    for picture in report.get("pictures") or []:
        views = [_view(view, picture["token"]) for view in picture["views"]]
        heading = element("h3", "Frame ", element("code", picture["token"]))
        frames.append(element("article", heading, element("p", picture["note"]), *views, class_="frame"))
    return section("pictures", "Pictures", _colours(report.get("colours") or {}), *frames) if frames else []


def _colours(colours: dict[str, str]) -> Html | None:
    """Which class has which colour."""
    items = [
        element("li", element("span", class_="tile", style=f"background: {colour}", aria_hidden="true"), name)
        for name, colour in colours.items()
    ]
    return element("ul", *items, class_="legend", aria_label="Colours of the classes") if items else None


def _view(view: dict[str, Any], token: str) -> Html:
    figures = []
    for role, head in HEAD.items():
        image = element(
            "img",
            src=view[role],
            width=view["width"],
            height=view["height"],
            alt=f"{view['title']} of frame {token} with the boxes that the {head} model finds",
        )
        figures.append(element("figure", image, element("figcaption", as_html(f"{view['title']}, {head}"))))
    return element("div", *figures, class_="halves")
