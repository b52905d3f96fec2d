"""The answer token by token in a real browser: what is held of prompt and answer at that moment."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.record.payload import trace_payload
from tests.app.record.test_forgetting import forgetful
from tests.browser.conftest import open_page

pytestmark = pytest.mark.browser

HELD = """() => {
  const { store } = window.DynamicKV;
  const run = store.trace.runs[store.view.run];
  const kept = run.now?.kept ?? run.kept;
  const all = kept.reduce((sum, count) => sum + count, 0);
  return { label: run.label, first: kept[0], later: kept[150], all };
}"""


def shown(page: Page, page_url: str) -> Any:
    open_page(page, page_url)
    page.wait_for_function("document.querySelector('.dkv-plot').data?.length > 3")
    trace = forgetful()
    page.evaluate("(payload) => window.DynamicKV.setTrace(payload)", trace_payload(trace, "file"))
    return page.locator(".dkv-forgetting")


def test_stepping_through_the_answer_shows_what_is_held_and_what_is_forgotten(
    page: Page, page_url: str
) -> None:
    line = shown(page, page_url)
    expect(line).to_be_visible()
    place = page.get_by_label("Answer tokens read", exact=True)
    place.fill("1")
    expect(line.locator("[data-role=note]")).to_contain_text("DynamicKV chooses first after 2")
    place.fill("3")
    expect(line.locator("[data-role=where]")).to_contain_text("3 of")
    expect(line.locator("[data-role=note]")).to_contain_text("chose again once, last after 2")
    held = page.evaluate(HELD)
    assert (held["label"], held["first"]) == ("DynamicKV", 0)
    assert held["later"] > 0
    words = line.locator("[data-role=answer] span")
    expect(words).to_have_count(3)
    assert "dkv-gone" in (words.nth(0).get_attribute("class") or "")
    assert [float(words.nth(n).evaluate("e => e.style.opacity")) for n in (0, 1, 2)] == [0.3, 1, 1]
    place.fill("6")
    assert page.evaluate(HELD)["later"] == 0
    expect(line.locator("[data-role=note]")).to_contain_text("2 times, last after 6")


def test_the_start_and_escape_bring_the_prompts_own_state_back(page: Page, page_url: str) -> None:
    line = shown(page, page_url)
    before = page.evaluate(HELD)
    place = page.get_by_label("Answer tokens read", exact=True)
    for leave in (lambda: place.fill("0"), lambda: page.keyboard.press("Escape")):
        place.fill("6")
        assert page.evaluate(HELD) != before
        leave()
        expect(line.locator("[data-role=where]")).to_contain_text("0 of")
        assert page.evaluate(HELD) == before


def test_records_without_choices_show_no_such_line(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    expect(page.locator(".dkv-film").first).to_be_visible()
    expect(page.locator(".dkv-forgetting")).to_be_hidden()
