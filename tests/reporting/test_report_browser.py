"""The page of a report in a browser: it loads nothing, works by keyboard, and fits a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import axe
import chromium
import pytest

import adapterkit as ak

DATA = Path(ak.__file__).parent / "demo" / "data"
SHOWN = "[...document.querySelectorAll('#rows tbody tr')].filter((row) => !row.hidden).map((row) => row.textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    place = tmp_path_factory.mktemp("report")
    ak.report([DATA / "rotated", DATA / "relabelled"], base=DATA / "base", out=place / "report.html")
    with chromium.page(tmp_path_factory.mktemp("browser")) as page:
        page.open((place / "report.html").as_uri())
        yield page


def test_nothing_is_loaded_and_nothing_is_wrong(page: chromium.Page) -> None:
    assert page.told("Log.entryAdded") == []
    assert page.told("Runtime.exceptionThrown") == []
    asked = {event["request"]["url"].split(":")[0] for event in page.told("Network.requestWillBeSent")}
    assert asked <= {"file", "data", "about"}
    assert page.evaluate("document.querySelectorAll('svg[role=img][aria-label]').length") > 6


def test_the_table_is_searched_and_sorted(page: chromium.Page) -> None:
    whole = page.evaluate(SHOWN)
    page.evaluate(
        "const q = document.getElementById('q'); q.value = 'DOWN rotated'; q.dispatchEvent(new Event('input'))"
    )
    found = page.evaluate(SHOWN)
    assert len(found) == 2
    assert all("down_proj" in row and "rotated" in row for row in found)
    assert page.evaluate("document.getElementById('count').textContent") == f"2 of {len(whole)} rows."
    page.evaluate("q.value = ''; q.dispatchEvent(new Event('input'))")
    page.evaluate("[...document.querySelectorAll('#rows th button')].find((b) => b.textContent === 'rank').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    ranks = page.evaluate("[...document.querySelectorAll('#rows tbody tr')].map((row) => row.cells[4].textContent)")
    known = [int(rank) for rank in ranks if rank]
    assert known == sorted(known, reverse=True)
    assert ranks[: len(known)] == [str(rank) for rank in known], "rows without a value come last"
    assert page.evaluate("document.activeElement.parentElement.getAttribute('aria-sort')") == "descending"


def test_marks_of_the_drawings_tell_their_numbers(page: chromium.Page) -> None:
    where = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
    mark = "document.querySelector('#f-norms-1-rotated [data-tip]')"
    page.evaluate(f"{mark}.scrollIntoView({{block: 'center'}})")
    x, y = page.evaluate(f"{where}({mark}.getBoundingClientRect())")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait("!document.getElementById('tip').hidden")
    assert page.evaluate("document.getElementById('tip').textContent") == page.evaluate(f"{mark}.dataset.tip")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_has_a_dark_side(page: chromium.Page, width: int) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(colour) != before
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(colour) == before
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(set(ids)) == len(ids)
    named = page.evaluate("[...document.querySelectorAll('[aria-labelledby]')].every((n) => "
                          "document.getElementById(n.getAttribute('aria-labelledby')))")  # fmt: skip
    assert named


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_people_with_a_keyboard_or_a_screen_reader_can_use_it(page: chromium.Page, width: int, scheme: str) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert axe.faults(page) == []
