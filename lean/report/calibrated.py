"""Where the numbers come from: calibration frames, commands, versions, files, times."""

from typing import Any

from lean.report.html import Html, Section, element, section, size, table


def notes_section(report: dict[str, Any]) -> Html | None:
    """What the page lacks, and why."""
    notes = [element("li", note) for note in report.get("notes") or []]
    return element("ul", *notes, class_="notes", aria_label="Notes") if notes else None


def calibration_section(report: dict[str, Any]) -> list[Section]:
    """The frames that the ranges were chosen on, and those that the effects were measured on."""
    calibration, parts = report.get("calibration"), []
    if calibration:
        text = f"{len(calibration['tokens'])} frames, pipeline “{calibration['pipeline']}”, seed {calibration['seed']}."
        parts += [element("p", text), _tokens("Sample tokens of the calibration frames", calibration["tokens"])]
    if measured := report.get("measured"):
        text = f"SQNR was measured on {len(measured)} frames."
        parts += [element("p", text), _tokens("Sample tokens of the frames that SQNR was measured on", measured)]
    return section("frames", "Frames", *parts) if parts else []


def _tokens(title: str, tokens: list[str]) -> Html:
    listed = element("ol", *(element("li", element("code", token)) for token in tokens), class_="tokens")
    return element("details", element("summary", title), listed)


def runs_section(report: dict[str, Any]) -> list[Section]:
    """Each run's exact command, settings, times and versions; then the files."""
    runs = [_run(run) for run in report["runs"]]
    if files := report.get("files"):
        rows = [
            [
                file["name"],
                "FP32" if file["role"] == "float" else "INT8",
                element("code", file["sha256"]),
                size(file["bytes"]),
            ]
            for file in files
        ]
        runs += [element("h3", "Files"), table(["File", "Model", "SHA-256", "Size"], rows, "Model files", 3)]
    return section("runs", "How it was made", *runs)


def _run(run: dict[str, Any]) -> Html:
    command = element("pre", element("code", run["command"]), tabindex="0", aria_label="Command")
    facts = [
        item
        for name, value in {"device": run["device"], **run["settings"]}.items()
        for item in (element("dt", name), element("dd", value))
    ]
    steps = [
        [step["name"], f"{step['seconds']:.1f}", *([] if step["peak_mib"] is None else [f"{step['peak_mib']:.0f}"])]
        for step in run["steps"]
    ]
    steps.append(["total", f"{sum(step['seconds'] for step in run['steps']):.1f}"])
    wide = any(step["peak_mib"] is not None for step in run["steps"])
    times = table(["Step", "Seconds", *(["Peak GPU MiB"] if wide else [])], steps, f"Time by step of {run['script']}")
    versions = table(["Package", "Version"], run["versions"].items(), f"Versions used by {run['script']}")
    halves = [element("div", element("h4", "Time by step"), times), element("div", element("h4", "Versions"), versions)]
    return element(
        "article",
        element("h3", run["script"]),
        command,
        element("dl", *facts),
        element("div", *halves, class_="halves"),
    )
