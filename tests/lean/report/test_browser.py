"""The page in a real browser: no errors, sorting, searching and picking work, it fits both widths and both schemes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lean.report.files import write
from tests.browser import Page, browser
from tests.lean.report.samples import EVIL, report

SHOWN = "[...document.querySelectorAll('tr.layer')].filter((row) => row.offsetParent).map((row) => row.dataset.name)"
WIDTHS, SCHEMES = (1280, 400), ("light", "dark")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(folder, report())
    return folder / "index.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def page(chromium, page_file) -> Page:
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(page_file)
    yield chromium
    assert chromium.errors == []


def type_into(page: Page, selector: str, text: str, event: str = "input") -> None:
    page.run(
        f"(() => {{ const field = document.querySelector({json.dumps(selector)}); field.value = {json.dumps(text)};"
        f" field.dispatchEvent(new Event('{event}')); }})()"
    )


def test_it_opens_alone_and_its_texts_do_nothing(page, page_file):
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert {url for url in page.requests if not url.startswith("data:")} == {page_file.resolve().as_uri()}
    assert page.run("document.title").startswith(EVIL)
    assert page.run("document.querySelector('h1').textContent") == EVIL


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(page, page_file, width, scheme):
    page.open(page_file, width, scheme=scheme)
    page.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert page.run("document.documentElement.scrollWidth") <= width
    cut = """[...document.querySelectorAll('section, header, nav, .cards li, svg, figure')]
        .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map((one) => one.tagName + '.' + one.className)"""
    assert page.run(cut) == []
    assert page.run(CONTRAST) == []


# Elements with text of their own whose colour has less than 4.5 times the contrast to what lies behind them.
CONTRAST = """(() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (one) => {
        const [r, g, b, a] = one ? rgb(getComputedStyle(one).backgroundColor) : [255, 255, 255];
        return a === 0 ? behind(one.parentElement) : [r, g, b];
    };
    const bad = [];
    for (const one of document.querySelectorAll('body *')) {
        const own = [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        if (!own || !one.checkVisibility() || one.closest('script, .skip, .hidden')) continue;
        const style = getComputedStyle(one);
        const [x, y] = [light(rgb(one.closest('svg') ? style.fill : style.color)), light(behind(one))];
        const ratio = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
        if (ratio < 4.5) bad.push(`${one.tagName}.${one.className.baseVal ?? one.className} ${ratio.toFixed(2)}`);
    }
    return bad;
})()"""


def test_sorting(page):
    rows = {row["name"]: row for row in report()["layers"]}
    page.run("document.getElementById('more').click()")

    def sort_by(key: str) -> list[str]:
        page.run(f"document.querySelector('[data-sort={key}]').click()")
        return page.run(SHOWN)

    up, down = sort_by("amax"), sort_by("amax")
    known = [name for name in up if rows[name]["amax"] is not None]
    assert len(up) == len(rows)
    assert known == sorted(known, key=lambda name: rows[name]["amax"])
    assert up[: len(known)] == known  # what has no amax comes last
    assert [rows[name]["amax"] for name in down[: len(known)]] == [rows[name]["amax"] for name in known[::-1]]
    assert down[len(known) :] == up[len(known) :]
    assert page.run("[...document.querySelectorAll('[aria-sort=descending]')].map((h) => h.textContent)") == ["amax"]
    names = sort_by("name")
    assert names[0] == "decoder.backbone.blocks.0.0"


def test_searching_and_filtering(page):
    rows = report()["layers"]
    type_into(page, "#search", "LAYER1 .add")
    found = page.run(SHOWN)
    assert sorted(found) == sorted(row["name"] for row in rows if "layer1" in row["name"] and ".add" in row["name"])
    assert found
    assert page.run("document.getElementById('count').textContent") == f"{len(found)} of {len(rows)} layers"
    type_into(page, "#search", "")
    type_into(page, "#state", "float", "change")
    assert sorted(page.run(SHOWN)) == sorted(row["name"] for row in rows if row["state"] == "float")
    type_into(page, "#branch", "fuser", "change")
    assert page.run(SHOWN) == []


def test_only_the_worst_are_shown_until_all_are_asked_for(page):
    rows = report()["layers"]
    assert len(rows) > 25
    assert len(page.run(SHOWN)) == 25
    page.run("document.getElementById('more').click()")
    assert len(page.run(SHOWN)) == len(rows)


def test_picking_a_tile_opens_its_layer_and_draws_its_charts(page):
    name = "encoders.camera.backbone.layer4.1.conv2"
    type_into(page, "#search", "fuser")
    page.run(f"document.querySelector('button.tile[data-pick=\"{name}\"]').click()")
    assert page.run("document.querySelector('tr.opened').dataset.name") == name
    assert page.run("document.activeElement.textContent") == name
    assert page.run("document.querySelectorAll('tr.opened + tr svg').length") == 2
    assert page.run("document.querySelector('tr.opened + tr .bars').getAttribute('d').length") > 500
    assert "NaN" not in page.run("document.querySelector('tr.opened + tr').innerHTML")
    assert "amax of the input" in page.run("document.querySelector('tr.opened + tr').innerText")
    assert page.run("document.querySelectorAll('.tile.picked').length") == 1
    assert 0 < page.run("document.querySelector('tr.opened').getBoundingClientRect().top") < 900


def test_every_layer_opens(page):
    page.run("document.getElementById('more').click()")
    broken = page.run("""[...document.querySelectorAll('tr.layer')].filter((row) => {
        if (!row.classList.contains('opened')) row.querySelector('.open').click();
        const inside = row.nextElementSibling;
        return !inside.querySelector('dl') || inside.innerHTML.includes('NaN') || inside.innerHTML.includes('Infinity');
    }).map((row) => row.dataset.name)""")
    assert broken == []


def test_a_layer_opens_and_closes_by_keyboard(page):
    page.run("document.querySelectorAll('tr.layer')[1].querySelector('.open').focus()")
    page.press("Enter")
    state = "document.querySelectorAll('tr.layer')[1].querySelector('.open').getAttribute('aria-expanded')"
    assert page.run(state) == "true"
    page.press("Enter")
    assert page.run(state) == "false"
    assert page.run("document.querySelectorAll('td.inside').length") == 0


def test_charts_say_what_is_under_the_pointer(page):
    page.run("document.querySelector('tr.opened + tr svg').scrollIntoView({block: 'center'})")
    box = page.run(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('tr.opened + tr svg').getBoundingClientRect())"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert "of the values" in page.run("document.querySelector('tr.opened + tr figcaption').textContent")


def test_it_prints_all_layers_on_white(page):
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert len(page.run(SHOWN)) == len(report()["layers"])
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="")


def test_a_page_without_layers_opens(page, tmp_path):
    write(tmp_path / "small", {key: report()[key] for key in ("format", "version", "title", "runs", "scores")})
    page.open(tmp_path / "small" / "index.html")
    assert page.run("document.querySelectorAll('section').length") == 3
