"""Nothing typed is lost while its tab lives, and nothing of it outlives the tab."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Page, expect

from app.examples import Example
from app.serving.model_host import ModelHost
from dynamickv.record.trace import Expected
from tests.app.synthetic import synthetic_trace
from tests.browser.conftest import example, open_page, pick, serve
from tests.browser.test_what_if import run
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

pytestmark = pytest.mark.browser
TEXT = "The walrus sleeps.\n\t<b>It</b> snores: 海象, שלום.\n" * 3
FIELDS = {"#dkv-document": TEXT, "#dkv-question": "Who sleeps?", "#dkv-expected": "walrus"}


@pytest.fixture(scope="module")
def tiny_url(
    recorded: dict[str, Example], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A page whose model is tiny and answers nonsense at once; one of its examples expects an
    answer.
    """
    llm = tiny_llm()
    examples = {name: recorded[name] for name in ("ordinary", "three")}
    trace = synthetic_trace(document=DOCUMENT)
    trace = replace(trace, expected=Expected(text="bank", document_utf16_span=None))
    examples["expecting"] = example("expecting", trace, tmp_path_factory.mktemp("expecting"))
    yield from serve(ModelHost("tiny", loader=lambda name: llm), examples)


def fill(page: Page) -> None:
    for field, text in FIELDS.items():
        page.locator(f"{field} :is(textarea, input)").fill(text)
    page.get_by_label("StreamingLLM").first.check()
    page.locator("#dkv-capacity input[type=number]").fill("72")
    expect(page.locator("#dkv-example input")).to_have_value("Your own text")


def expect_kept(page: Page) -> None:
    for field, text in FIELDS.items():
        expect(page.locator(f"{field} :is(textarea, input)")).to_have_value(text)
    expect(page.get_by_label("StreamingLLM").first).to_be_checked()
    expect(page.locator("#dkv-capacity input[type=number]")).to_have_value("72")
    expect(page.locator("#dkv-example input")).to_have_value("Your own text")


def test_a_reload_keeps_text_question_and_settings(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    fill(page)
    page.reload()
    expect_kept(page)


def test_an_example_in_between_loses_nothing(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    fill(page)
    pick(page, "Three")
    expect(page.locator("#dkv-document textarea")).to_have_value(re.compile("river"))
    expect(page.locator("#dkv-expected :is(textarea, input)")).to_have_value("")
    pick(page, "Your own text")
    expect_kept(page)


def test_what_an_example_expects_goes_with_its_text_and_what_is_typed_stays(
    page: Page, tiny_url: str
) -> None:
    open_page(page, tiny_url, "?ex=expecting")
    document = page.locator("#dkv-document textarea")
    sought = page.locator("#dkv-expected :is(textarea, input)")
    expect(sought).to_have_value("bank")
    document.fill(TEXT)
    sought.fill("walrus")  # before the page has heard that the text is another
    expect(page.locator("#dkv-example input")).to_have_value("Your own text")
    page.wait_for_timeout(500)
    expect(sought).to_have_value("walrus")
    pick(page, "Expecting")
    expect(sought).to_have_value("bank")
    page.locator("#dkv-run").click()  # what is on screen is then no example's any more
    page.wait_for_function("window.DynamicKV.store.trace?.source.startsWith('run here')")
    document.fill(TEXT)
    expect(sought).to_have_value("")


def test_a_second_tab_starts_anew_and_leaves_the_first_alone(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    fill(page)
    other = page.context.new_page()
    open_page(other, page_url)
    expect(other.locator("#dkv-document textarea")).to_have_value(re.compile("river"))
    other.locator("#dkv-document textarea").fill("Another text.")
    other.reload()
    expect(other.locator("#dkv-document textarea")).to_have_value("Another text.")
    page.reload()
    expect_kept(page)


def test_a_link_goes_before_what_was_kept(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    fill(page)
    open_page(page, page_url, "?ex=fits")
    expect(page.locator("#dkv-example input")).to_have_value("Fits")
    pick(page, "Your own text")
    expect_kept(page)


def test_a_link_opened_again_shows_its_own_text_and_loses_none(page: Page, page_url: str) -> None:
    open_page(page, page_url, "?ex=scored")
    expect(page.locator("#dkv-example input")).to_have_value("Scored")
    fill(page)
    page.reload()  # which is no link that somebody follows
    expect_kept(page)
    open_page(page, page_url, "?ex=scored")
    expect(page.locator("#dkv-document textarea")).to_have_value(re.compile("river"))
    expect(page.locator("#dkv-example input")).to_have_value("Scored")
    pick(page, "Your own text")
    expect_kept(page)


def test_the_last_run_comes_back_with_its_words_and_its_what_if(page: Page, tiny_url: str) -> None:
    run(page, tiny_url)
    answers = page.locator(".dkv-words").all_inner_texts()
    kept = page.evaluate("window.DynamicKV.store.trace.runs[1].retained.bits")
    page.wait_for_function("sessionStorage.getItem('dkv-run')")
    page.reload()
    expect(page.locator("[data-role=source]")).to_contain_text("run here")
    expect(page.locator("#dkv-document textarea")).to_have_value(DOCUMENT)
    expect(page.locator("#dkv-question textarea")).to_have_value(QUESTION)
    assert page.locator(".dkv-words").all_inner_texts() == answers
    assert page.evaluate("window.DynamicKV.store.trace.runs[1].retained.bits") == kept
    # The server still holds its prompt: what-if goes on from here.
    page.locator("[data-setting=capacity]").fill("40")
    page.wait_for_function("window.DynamicKV.store.trace.runs.at(-1).predicted")


def test_what_is_kept_lies_in_the_tab_s_session_alone(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    fill(page)
    page.wait_for_function("sessionStorage.getItem('dkv-form')?.includes('walrus')")
    kept = "JSON.stringify([{...localStorage}, document.cookie, document.title, location.href])"
    assert "walrus" not in page.evaluate(kept)
    assert page.evaluate("indexedDB.databases().then((all) => all.length)") == 0


def test_a_broken_or_full_store_costs_nothing_else(page: Page, page_url: str) -> None:
    page.add_init_script("try { sessionStorage.setItem('dkv-form', '{\"values\": 3}'); } catch {}")
    open_page(page, page_url)
    page.evaluate("void (Storage.prototype.setItem = () => { throw new Error('full'); })")
    fill(page)
    pick(page, "Three")
    expect(page.locator("#dkv-example input")).to_have_value("Three")
