"""Putting together what several runs have found out about one model."""

from typing import Any

from lean.errors import QuantizationError

JOINED = ("runs", "notes")


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A report of both: sections of `new` replace those of `old`; runs, notes, files and tables add up.

    Raises:
        QuantizationError: the reports are of different models.
    """
    refuse_other_model(old, new)
    merged = {**old, **{key: value for key, value in new.items() if value is not None}}
    for key in JOINED:
        merged[key] = [
            *(old.get(key) or []),
            *(item for item in new.get(key) or [] if item not in (old.get(key) or [])),
        ]
    merged["title"] = old["title"]
    merged["files"] = _by_key(old, new, "files", lambda one: (one["role"], one["sha256"], one["name"]))
    merged["tables"] = _by_key(old, new, "tables", lambda one: one["id"])
    return merged


def refuse_other_model(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Make sure that the files of two reports are the same, as far as both name files of a role.

    Raises:
        QuantizationError: naming a file of each.
    """
    for role in ("float", "int8"):
        ours, theirs = ([one for one in report.get("files") or [] if one["role"] == role] for report in (new, old))
        known = {one["sha256"] for one in theirs}
        if ours and theirs and not any(one["sha256"] in known for one in ours):
            raise QuantizationError(
                f"the report is of another {role} model, {theirs[0]['name']}, than {ours[0]['name']}: "
                "write this one to a folder of its own"
            )


def _by_key(old: dict, new: dict, section: str, key: Any) -> list:
    return list({key(one): one for report in (old, new) for one in report.get(section) or []}.values())
