"""The page of a report: a pure function from its data to one HTML file that needs nothing else."""

import json
from importlib import resources
from string import Template
from typing import Any

from lean.report.calibrated import calibration_section, notes_section, runs_section
from lean.report.html import as_html, element, joined
from lean.report.layers import layers_section, map_section
from lean.report.scores import drift_section, pictures_section, scores_section, tables_sections
from lean.report.summary import header, summary_section

SECTIONS = (
    summary_section,
    scores_section,
    drift_section,
    map_section,
    layers_section,
    tables_sections,
    pictures_section,
    calibration_section,
    runs_section,
)


def render(report: dict[str, Any]) -> str:
    """The page of a checked report (see `lean.report.schema`); equal data give equal pages."""
    sections = [section for make in SECTIONS for section in make(report)]
    links = [element("li", element("a", section.title, href=f"#{section.id}")) for section in sections]
    contents = element("nav", element("ul", *links), aria_label="Sections")
    main = element("main", notes_section(report), *(section.html for section in sections), id="main")
    return Template(_resource("page.html")).substitute(
        title=as_html(f"{report['title']} · INT8 report"),
        style=_resource("style.css"),
        body=joined([header(report), contents, main]),
        charts=for_script(report.get("quantizers") or {}),
        script=_resource("script.js"),
    )


def for_script(data: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or starts a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return resources.files("lean.report").joinpath(name).read_text(encoding="utf-8").rstrip("\n")
