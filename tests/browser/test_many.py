"""From one run to many, in a browser: cells that open, capacities, another question, earlier runs,
pictures, the gallery and the hall.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.examples import Example
from app.serving.model_host import ModelHost
from tests.browser.conftest import open_page, serious_findings, serve
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def tiny_url(
    recorded: dict[str, Example], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A page with a tiny model, an example and a loss of the gallery."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNAMICKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        host = ModelHost("tiny", loader=lambda name: tiny_llm())
        three = recorded["three"]
        loss = replace(three, model="Tiny-1M", lost="The bank is lost.", expected=("northern",))
        yield from serve(host, {"ordinary": recorded["ordinary"], "three": loss})


def run_own(page: Page, question: str = QUESTION) -> None:
    """Run a text of one's own with DynamicKV at a small capacity."""
    page.locator("#dkv-document textarea").fill(DOCUMENT)
    page.locator("#dkv-question textarea").fill(question)
    page.get_by_label("number input for Capacity").fill("40")
    page.get_by_label("number input for Capacity").press("Tab")
    page.locator("#dkv-run").click()
    status = page.locator("#dkv-status")
    expect(status).to_contain_text("Done.", timeout=60_000)
    page.wait_for_function(
        "q => window.DynamicKV.store.trace.record.prompt.question === q", arg=question
    )


def test_a_cell_opens_its_run_by_keyboard_alone(page: Page, tiny_url: str) -> None:
    open_page(page, tiny_url)
    page.get_by_role("tab", name="Lab", exact=True).click()
    page.get_by_label("Capacities").fill("24")
    page.get_by_label("Lengths, in tokens").fill("300")
    page.get_by_label("number input for Depths").fill("2")
    page.get_by_label("number input for Texts per cell").fill("1")
    page.locator("#dkv-lab-needle-run").click()
    expect(page.locator("#dkv-lab-needle-status")).to_contain_text("Done.", timeout=60_000)
    page.locator("#dkv-lab-needle [data-role=plot]").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    cell = page.locator("#dkv-lab-needle [data-role=cell]")
    expect(cell).to_have_text(re.compile(r"StreamingLLM, capacity 24: 300 tokens, depth 0 %"))
    expect(page.locator("#dkv-lab-needle [data-role=mark]")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("#dkv-status")).to_contain_text("Done.", timeout=60_000)
    expect(page.locator(".dkv-card")).to_have_count(4)
    methods = page.evaluate("window.DynamicKV.store.trace.runs.map((run) => run.method)")
    assert methods == ["FullKV", "SnapKV", "DynamicKV", "StreamingLLM"] or "StreamingLLM" in methods
    question = page.evaluate("window.DynamicKV.store.trace.record.prompt.question")
    assert page.locator("#dkv-question textarea").input_value() == question


def test_the_smallest_capacity_and_another_question_stand_beside_the_cards(
    page: Page, tiny_url: str
) -> None:
    open_page(page, tiny_url)
    run_own(page)
    page.get_by_role("button", name="Smallest capacity that still answers").click()
    rows = page.locator(".dkv-smallest-table tbody tr")
    expect(rows).to_have_count(1, timeout=60_000)
    expect(rows.first).to_contain_text("DynamicKV")
    expect(page.locator("#dkv-status")).to_contain_text("Done.")
    page.locator("#dkv-ask-question").fill("When was the harbour built?")
    page.keyboard.press("Enter")
    expect(page.locator(".dkv-asked-text")).to_be_visible(timeout=60_000)
    expect(page.locator(".dkv-asked-row")).to_have_count(2)
    expect(page.locator(".dkv-asked-row").nth(1)).to_contain_text("of what this question would")
    expect(page.locator(".dkv-would-gone").nth(1)).to_be_visible()
    assert page.locator(".dkv-asked-text").inner_text().split() == DOCUMENT.split()
    assert serious_findings(page) == []


def test_an_earlier_run_comes_back_and_no_other_tab_has_it(page: Page, tiny_url: str) -> None:
    open_page(page, tiny_url)
    run_own(page, "Who keeps the light?")
    run_own(page, "Who keeps the books?")
    page.locator(".dkv-history summary").click()
    page.locator(".dkv-history-run", has_text="Who keeps the light?").click()
    question = page.locator("#dkv-question textarea")
    expect(question).to_have_value("Who keeps the light?")
    expect(page.locator(".dkv-answers [data-role=question]")).to_have_text("Who keeps the light?")
    assert page.evaluate("JSON.stringify(localStorage)").count("keeps") == 0
    other = page.context.new_page()
    other.goto(tiny_url)
    other.wait_for_function("window.DynamicKV?.store.trace")
    assert other.evaluate("sessionStorage.getItem('dkv-history')").count("keeps") == 0


def test_a_view_is_saved_as_picture_and_table_with_its_title(
    page: Page, page_url: str, tmp_path: Path
) -> None:
    open_page(page, page_url)
    for view in ("answers", "map", "text"):
        if view == "text":
            page.locator(".dkv-document .dkv-menu summary").click()
        menu = page.locator(f".dkv-save-view[data-view={view}]")
        saved = {}
        for kind in ("svg", "png", "csv"):
            with page.expect_download() as waiting:
                menu.select_option(kind)
            saved[kind] = tmp_path / f"{view}.{kind}"
            waiting.value.save_as(saved[kind])
            assert waiting.value.suggested_filename.endswith(f"_{view}.{kind}")
        drawn = saved["svg"].read_text()
        table = saved["csv"].read_text()
        for words in ("Which bank was reinforced?", "capacity 96", "FullKV, DynamicKV"):
            assert words in drawn
            assert words in table
        assert drawn.count("<text" if view != "map" else "<image") > 0
        assert saved["png"].read_bytes()[:4] == b"\x89PNG"
        assert saved["png"].stat().st_size > 5000


def test_a_formula_in_an_answer_is_saved_as_text(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    line = page.evaluate("window.DynamicKV.csv([['=1+1', '@x', 'a,b', 3]])")
    assert line == "'=1+1,'@x,\"a,b\",3\n"


def test_the_gallery_leads_to_the_loss_in_explore(page: Page, tiny_url: str) -> None:
    open_page(page, tiny_url)
    page.get_by_role("tab", name="Gallery", exact=True).click()
    card = page.locator(".dkv-gallery-card")
    expect(card).to_have_count(1)
    expect(card).to_contain_text("Tiny-1M")
    expect(card).to_contain_text("The bank is lost.")
    assert serious_findings(page) == []
    card.get_by_role("link").click()
    page.wait_for_url("**ex=three**")
    expect(page.locator(".dkv-card")).to_have_count(3)
    assert page.evaluate("window.DynamicKV.store.trace.example") == "three"


def test_the_hall_shows_one_thing_per_screen_and_follows_a_clicker(
    page: Page, page_url: str
) -> None:
    page.set_viewport_size({"width": 1366, "height": 768})
    page.goto(f"{page_url}?big=1")
    bar = page.locator(".dkv-hall-bar")
    expect(bar).to_contain_text("1 of 7")
    parts = ["#dkv-answers", "#dkv-word", "#dkv-document-view", "#dkv-figures", "#dkv-map"]
    seen = []
    for number in range(1, 8):
        expect(bar).to_contain_text(f"{number} of 7")
        shown = [part for part in parts if page.locator(part).is_visible()]
        assert len(shown) <= 1, shown
        seen += shown
        expect(page.locator("#dkv-inputs")).to_be_hidden()
        over = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert over <= 0
        page.keyboard.press("PageDown" if number % 2 else "ArrowRight")
    assert set(seen) == set(parts)
    page.keyboard.press("Home")
    size = page.locator(".dkv-answer").first.evaluate(
        "n => parseFloat(getComputedStyle(n).fontSize) * (n.currentCSSZoom ?? 1)"
    )
    assert size >= 24
    page.keyboard.press("Escape")
    expect(page.locator("#dkv-inputs")).to_be_visible()
    expect(bar).to_have_count(0)


def test_the_hall_says_what_the_big_figures_are(page: Page, page_url: str) -> None:
    page.set_viewport_size({"width": 1366, "height": 768})
    page.goto(f"{page_url}?big=1&ex=three")
    words = page.locator(".dkv-card .dkv-big small")
    expect(words).to_have_text(["the reference", "survives", "survives"])
    for number in range(3):
        expect(words.nth(number)).to_be_visible()


def test_the_hall_does_what_it_tells(page: Page, page_url: str) -> None:
    page.goto(f"{page_url}?big=1")
    bar = page.locator(".dkv-hall-bar")
    expect(bar).to_contain_text("1 of 7")
    for title, state in (
        ("The word that is lost", "Boolean(window.DynamicKV.word())"),
        ("What that word read", "Boolean(window.DynamicKV.word())"),
        ("What one layer kept", "window.DynamicKV.store.view.layer === 15"),
        ("Where the sentence survives", "Boolean(window.DynamicKV.store.pin)"),
    ):
        page.keyboard.press("ArrowRight")
        expect(bar.locator("h2")).to_have_text(title)
        assert page.evaluate(state)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("window.DynamicKV.store.view.layer") == 16
