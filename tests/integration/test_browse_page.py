"""The browse page in a real browser: it loads, filters, plays, edits, marks and exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kinema.data.manifest import Manifest
from tests.unit.serving.browse_fixtures import XSS, make_clips, served

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine's PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page of five clips; fails the test where it asks another host, or a script fails."""
    manifest = make_clips(tmp_path / "clips", dropped_by=["", "", "", "filter: blur", ""])
    faults: list[str] = []
    with served(manifest, cache=tmp_path / "cache") as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: faults.extend(_outside(asked.url, address)))
        page.goto(address)
        page.wait_for_selector(".card img")
        yield page
        page.close()
    assert not faults


def _outside(url: str, address: str) -> list[str]:
    return [] if url.startswith((address, "blob:", "data:")) else [url]


def rows(page: Any) -> list[int]:
    cards = page.query_selector_all(".card")
    return sorted(int(card.get_attribute("data-row")) for card in cards)


def until_rows(page: Any, wanted: list[int]) -> None:
    page.wait_for_function(
        """wanted => JSON.stringify([...document.querySelectorAll('.card')]
        .map(c => Number(c.dataset.row)).sort()) === JSON.stringify(wanted)""",
        arg=wanted,
    )


def test_it_loads_filters_and_searches(page: Any) -> None:
    assert rows(page) == [0, 1, 2, 4]
    assert "4 of 5 clips" in page.inner_text("#count")
    page.wait_for_selector('.card[data-row="4"] .why')
    assert "no such file" in page.inner_text('.card[data-row="4"]')

    page.check('input[value="all"]', force=True)
    until_rows(page, [0, 1, 2, 3, 4])
    assert "filter: blur" in page.inner_text('.card[data-row="3"]')

    page.fill("#search", "red BOX")
    until_rows(page, [0, 2])
    page.fill("#search", "")
    page.fill("#filter", "aesthetic > 4.5")
    until_rows(page, [1, 3])
    page.fill("#filter", "asthetic > 4.5")
    page.wait_for_selector("#problem:not([hidden])")
    assert "asthetic" in page.inner_text("#problem")
    page.fill("#filter", "")
    until_rows(page, [0, 1, 2, 3, 4])

    # Brush the upper half of the histogram of `aesthetic` (3.0 to 6.3), right after typing.
    page.fill("#filter", "width == 128")
    chart = page.wait_for_selector("#sidebar details:first-child svg")
    box = chart.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, middle, steps=4)
    page.mouse.up()
    until_rows(page, [1, 3])
    page.reload()
    until_rows(page, [1, 3])  # what was asked for is in the address
    assert page.input_value("#filter") == "width == 128"
    page.click(".chip")
    until_rows(page, [0, 1, 2, 3, 4])
    page.click('.values button[title="pan_left"]')
    until_rows(page, [1])


def test_it_plays_under_the_pointer_and_by_keys(page: Any) -> None:
    page.hover('.card[data-row="0"] .film')
    page.wait_for_selector('.card[data-row="0"] video')
    page.wait_for_function("() => document.querySelector('.card video').currentTime > 0.2")
    assert page.evaluate("document.querySelector('.card video').muted")
    page.mouse.move(5, 5)
    page.wait_for_selector(".card video", state="detached")

    page.once("dialog", lambda asked: asked.accept())
    page.keyboard.press("Shift+M")
    page.wait_for_selector("#marked-count:has-text('4')")
    page.wait_for_selector('.card.marked[data-row="4"]')

    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    page.wait_for_function("() => document.querySelector('.card.current video').currentTime > 0.1")
    page.keyboard.press(" ")
    page.wait_for_function("() => document.querySelector('.card.current video').paused")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    page.wait_for_function("() => document.querySelector('.stage video').currentTime > 0.1")
    assert page.inner_text("#detail-title") == "Row 0"
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.getElementById('detail-title').innerText === 'Row 1'")
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail[open]", state="detached")


def test_it_edits_marks_and_exports(page: Any, tmp_path: Path) -> None:
    page.click('.card[data-row="2"] .words')
    page.wait_for_selector("#detail[open]")
    page.fill("#caption", "A box that I describe anew")
    page.click("#save")
    page.wait_for_function("() => document.getElementById('saved').innerText === 'saved'")
    page.keyboard.press("m")
    page.wait_for_function("() => document.getElementById('marked-count').innerText === '1'")
    page.press("#caption", "ArrowLeft")  # moves in the text, not to another clip
    assert page.inner_text("#detail-title") == "Row 2"
    page.fill("#caption", "Kept by going on")
    page.click("#next")
    page.wait_for_function("() => document.getElementById('detail-title').innerText === 'Row 4'")
    page.click("#close")
    page.wait_for_selector("#detail[open]", state="detached")
    assert "Kept by going on" in page.inner_text('.card[data-row="2"]')
    assert "edited" in page.inner_text('.card[data-row="2"]')
    lines = (tmp_path / "clips/m.parquet.edits.jsonl").read_text().splitlines()
    assert [json.loads(line).get("text") for line in lines] == [
        "A box that I describe anew", None, "Kept by going on",
    ]  # fmt: skip

    page.click("#export-button")
    page.check('input[value="marked"]')
    page.fill("#export-name", "mine.csv")
    page.click("#export-write")
    page.wait_for_function(
        "() => document.getElementById('export-said').innerText.includes('1 rows')"
    )
    mine = Manifest.read(tmp_path / "clips/mine.csv")
    assert (len(mine), mine.path(0), mine.text(0)) == (1, "2.mp4", "Kept by going on")
    with page.expect_download() as download:
        page.click("#download-parquet")
    download.value.save_as(tmp_path / "loaded.parquet")
    assert Manifest.read(tmp_path / "loaded.parquet").text(0) == "Kept by going on"


def test_captions_are_text(page: Any) -> None:
    page.wait_for_timeout(300)
    assert XSS in page.inner_text('.card[data-row="1"] .words')
    page.click('.card[data-row="1"] .words')
    page.wait_for_selector("#detail[open]")
    assert page.input_value("#caption") == XSS
    page.fill("#caption", XSS + "<script>window.harmed = true</script>")
    page.click("#save")
    page.wait_for_function("() => document.getElementById('saved').innerText === 'saved'")
    page.click("#original summary")
    page.keyboard.press("Escape")
    assert page.evaluate("window.harmed") is None
    assert page.query_selector_all('img[src="x"]') == []
