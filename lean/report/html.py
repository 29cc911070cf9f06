"""Building HTML that can't be broken by the text in it."""

import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
VOID = {"img", "input", "br"}


class Html(str):
    """Text that is HTML already; any other string is escaped where it is put into an element."""


def as_html(child: object) -> Html:
    """Escape anything but `Html`; None gives nothing."""
    if isinstance(child, Html):
        return child
    return Html("" if child is None else html.escape(str(child)))


def element(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not `Html` are text.

    Attributes are escaped; `class_` stands for `class` and `data_x` for `data-x`; True gives an attribute without a
    value, None and False none.
    """
    parts = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{html.escape(str(value))}"')
    start = f"<{' '.join(parts)}>"
    return Html(start if name in VOID else f"{start}{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Html:
    """The children one after the other."""
    return Html("".join(as_html(child) for child in children))


def breakable(name: str) -> Html:
    """A name that may be broken after its dots and underscores."""
    return Html("<wbr>".join(as_html(part) for part in re.split(r"(?<=[._])", name)))


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A number with so many decimals, a dash for None."""
    if value is None:
        return DASH
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, plain unless it is very large or small; a dash for None."""
    if value is None:
        return DASH
    short = float(f"{value:.{digits}g}")
    plain = short == 0 or 1e-4 <= abs(short) < 1e6
    return (f"{Decimal(repr(short)):f}".removesuffix(".0") if plain else f"{short:g}").replace("-", MINUS)


def percent(fraction: float | None) -> str:
    """A fraction in per cent: exact zero as 0, small ones with the digits that tell."""
    if fraction is None:
        return DASH
    value = 100 * fraction
    if value == 0:
        return "0 %"
    if value < 0.0001:
        return "< 0.0001 %"
    digits = max(0, 2 - math.floor(math.log10(value))) if value < 1 else 1
    return f"{value:.{min(digits, 4)}f} %"


def scaled(value: float | None, unit: str = "") -> str:
    """A count with a decimal prefix: 1234567 gives 1.23 M."""
    if value is None:
        return DASH
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def size(count: float | None) -> str:
    """Bytes in MiB, or KiB where that is less than one."""
    if count is None:
        return DASH
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


@dataclass(frozen=True)
class Section:
    """A part of the page, with what the list of contents needs of it."""

    id: str
    title: str
    html: Html


def section(id_: str, title: str, *children: object, **attributes: object) -> list[Section]:
    """A section with its heading, in a list of its own."""
    heading = element("h2", title, id=f"{id_}-title")
    return [
        Section(
            id_, title, element("section", heading, *children, id=id_, aria_labelledby=f"{id_}-title", **attributes)
        )
    ]


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, text_columns: int = 1) -> Html:
    """A table that scrolls by itself where it is too wide; all but the first `text_columns` columns are numbers."""

    def cells(kind: str, row: Sequence[object], **first: str) -> Iterator[Html]:
        for column, cell in enumerate(row):
            name, attributes = (kind, {}) if column else ("th", first)
            yield element(name, cell, class_="n" if column >= text_columns else None, **attributes)

    heading = element(
        "tr", *(element("th", c, scope="col", class_="n" if i >= text_columns else None) for i, c in enumerate(head))
    )
    body = [element("tr", *cells("td", row, scope="row")) for row in rows]
    content = element(
        "table", element("caption", caption, class_="hidden"), element("thead", heading), element("tbody", *body)
    )
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)
