"""The page as text: nothing breaks out of it, nothing is fetched, every section has its part."""

import re
from html.parser import HTMLParser

import pytest

from lean.report.html import element, percent, scaled, significant
from lean.report.layers import quality, stage
from lean.report.page import for_script, render
from tests.lean.report.samples import EVIL, report

VOID = {"meta", "link", "img", "input", "br", "wbr"}


class Outline(HTMLParser):
    """Elements of a page, with their attributes and texts."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def whole() -> dict:
    return report()


@pytest.fixture(scope="module")
def outline(whole) -> Outline:
    return Outline(render(whole))


def test_texts_stay_texts(outline, whole):
    assert outline.open == []
    assert [attributes["src"] for tag, attributes in outline.elements if tag == "img"] == [
        view[role] for view in whole["pictures"][0]["views"] for role in ("float", "int8")
    ]
    assert not [name for _, attributes in outline.elements for name in attributes if name.startswith("on")]
    scripts = [tag for tag, _ in outline.elements if tag == "script"]
    assert len(scripts) == 2
    assert EVIL in outline.texts
    assert any(attributes.get("data-why") == EVIL for _, attributes in outline.elements)


def test_nothing_is_fetched(whole):
    page = render({**whole, "title": "plain"})
    assert "default-src 'none'" in page
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    sources = [
        attributes[key]
        for tag, attributes in Outline(page).elements
        for key in ("src", "href", "srcset", "data", "action")
        if key in attributes
    ]
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"@import|url\(", page)


def test_labels_and_links_lead_somewhere(outline):
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in outline.elements:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    assert all(attributes.get("alt") for tag, attributes in outline.elements if tag == "img")


def test_the_worst_layer_comes_first_and_float_ones_last(outline):
    rows = [attributes for tag, attributes in outline.elements if tag == "tr" and attributes.get("class") == "layer"]
    states = [row["data-state"] for row in rows]
    inside = [float(row["data-sqnr"]) for row in rows if row["data-state"] == "int8"]
    assert inside == sorted(inside)
    assert states == sorted(states, key=lambda state: state != "int8")
    assert len(rows) == len(report()["layers"])


SECTIONS = {
    "scores": {"scores"},
    "layers": {"map", "layers"},
    "drift": {"drift"},
    "tables": {"table-sensitivity"},
    "pictures": {"pictures"},
}


@pytest.mark.parametrize("key", SECTIONS)
def test_a_report_without_a_section_has_no_heading_for_it(whole, key):
    part = {name: value for name, value in whole.items() if name != key}
    found = {attributes.get("id") for tag, attributes in Outline(render(part)).elements if tag == "section"}
    assert not found & SECTIONS[key]
    assert found >= {"runs", *set().union(*SECTIONS.values())} - SECTIONS[key]


def test_the_least_report_is_a_page(whole):
    page = render({key: whole[key] for key in ("format", "version", "title", "runs")})
    assert Outline(page).open == []


def test_equal_data_give_equal_pages(whole):
    assert render(whole) == render(report())


def test_a_full_model_fits_into_a_tenth_of_the_limit(whole):
    quantizers = dict.fromkeys((f"layer{i}" for i in range(110)), next(iter(whole["quantizers"].values())))
    rows = [
        {**whole["layers"][0], "name": f"encoders.camera.backbone.layer{i}", "quantizer": f"layer{i}"}
        for i in range(150)
    ]
    page = render({**whole, "layers": rows, "quantizers": quantizers, "pictures": []})
    assert len(page.encode()) < 500_000


def test_a_layer_has_its_colour():
    of = [quality({"state": "int8", "sqnr": value}) for value in (9.9, 10, 29.9, 39.9, 40, None)]
    assert of == ["q0", "q1", "q2", "q3", "q4", "na"]
    assert quality({"state": "disabled", "sqnr": 50}) == "off"


def test_a_layer_has_its_stage():
    def of(name: str) -> str:
        return stage({"name": name, "branch": "encoders.camera"})

    assert of("encoders.camera.backbone.layer1.0.conv1") == "backbone.layer1"
    assert of("encoders.camera.backbone.layer10.0.downsample.0") == "backbone.layer10"
    assert of("encoders.camera.backbone.conv1") == "backbone"
    assert of("encoders.camera.conv") == ""


def test_numbers_as_text():
    assert [significant(value) for value in (0.0, 18432.0, 3.14159, -0.00012, 1.5e9, None)] == [
        *("0", "18400", "3.14", "\u22120.00012", "1.5e+09", "\u2013"),
    ]
    assert [percent(value) for value in (0.0, 1e-9, 3.2e-5, 0.0123, 0.5, 1.0)] == [
        *("0 %", "< 0.0001 %", "0.0032 %", "1.2 %", "50.0 %", "100.0 %"),
    ]
    assert [scaled(value) for value in (0.0, 999, 1_234_000, 56.7e9, None)] == [
        "0",
        "999",
        "1.23 M",
        "56.7 G",
        "\u2013",
    ]


def test_attributes_and_data_are_escaped():
    assert element("p", "<b>", title='"', data_x=True, hidden=None) == '<p title="&quot;" data-x>&lt;b&gt;</p>'
    assert for_script({"</script>": "<!-- &"}) == '{"\\u003c/script\\u003e":"\\u003c!-- \\u0026"}'
