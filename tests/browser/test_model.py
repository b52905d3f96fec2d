"""The page with the embedded model: a real comparison, Stop, and the endpoints."""

from __future__ import annotations

import re

import pytest
from gradio_client import Client
from playwright.sync_api import Page, expect

from dynamickv.record.trace import Trace
from tests.browser.conftest import open_page

pytestmark = [pytest.mark.browser, pytest.mark.model]

DOCUMENT = (
    "The harbour board met on Tuesday. The ferry sails at nine and at four. "
    "The new lamp was paid for by Henrietta Quill. The east pier has four loose rings. "
) * 9
QUESTION = "Who paid for the new lamp?"


def prepare(page: Page, url: str, new_tokens: int, document: str = DOCUMENT) -> None:
    """Fill the form for a short real run."""
    open_page(page, url)
    expect(page.locator(".dkv-model")).to_have_attribute("data-state", "ready", timeout=90_000)
    page.locator("#dkv-document textarea").fill(document)
    page.locator("#dkv-question textarea").fill(QUESTION)
    page.locator("#dkv-advanced > button").click()
    length = page.get_by_label("number input for Longest answer, in tokens")
    length.fill(str(new_tokens))
    length.blur()
    capacity = page.locator("#dkv-capacity input[type=number]")
    capacity.fill("64")
    capacity.blur()


def watch_status(page: Page) -> None:
    """Keep all that the status line says, and whether a run could be stopped, however shortly."""
    page.evaluate("""() => {
        [window.said, window.stoppable] = [[], false];
        const note = () => window.said.push(document.querySelector("#dkv-status").textContent);
        const options = {subtree: true, childList: true, characterData: true};
        new MutationObserver(note).observe(document.querySelector("#dkv-status"), options);
        const stop = () => document.querySelector("#dkv-stop");
        const look = () => { if (!stop().disabled) window.stoppable = true; };
        new MutationObserver(look).observe(stop().parentElement, {...options, attributes: true});
    }""")


def test_a_comparison_runs_from_paste_to_receipts(page: Page, model_url: str) -> None:
    prepare(page, model_url, 8)
    expect(page.locator("#dkv-count")).to_contain_text("in the prompt; the model reads 8,192")
    expect(page.locator("#dkv-capacity-line")).to_contain_text("% of the prompt")
    watch_status(page)
    page.locator("#dkv-run").click()
    expect(page.locator("#dkv-status")).to_contain_text("Done.", timeout=60_000)
    assert page.evaluate("window.stoppable")
    assert re.search(r"layer \d+ of 30", " ".join(page.evaluate("window.said")))
    expect(page.locator("[data-role=source]")).to_contain_text("run here")
    card = page.locator(".dkv-card[data-method=DynamicKV]")
    expect(card.locator(".dkv-chip")).to_have_text("compressed at 30 of 30 layers")
    expect(card.locator(".dkv-answer")).not_to_be_empty()
    expect(card.locator(".dkv-receipts")).to_contain_text("MiB")
    text = page.evaluate("document.querySelector('.dkv-text[data-role=text]').textContent")
    assert text == DOCUMENT
    expect(page.locator("#dkv-run")).to_be_enabled()
    assert page.evaluate("document.querySelectorAll('*').length") < 3000


def test_stop_leaves_partial_answers_labelled(page: Page, model_url: str) -> None:
    prepare(page, model_url, 400)
    page.locator("#dkv-question textarea").fill(
        "Write a long story about the lamp, with many characters."
    )
    page.locator("#dkv-run").click()
    expect(page.locator(".dkv-card[data-state=running] .dkv-answer").last).to_contain_text(
        "e", timeout=60_000
    )
    page.locator("#dkv-stop").click()
    expect(page.locator("#dkv-status")).to_contain_text("Stopped", timeout=10_000)
    expect(page.locator(".dkv-card[data-state=stopped] .dkv-finish").last).to_contain_text(
        "stopped after"
    )
    expect(page.locator("#dkv-run")).to_be_enabled()
    expect(page.locator("#dkv-stop")).to_be_disabled()


def test_stop_during_the_prefill_keeps_the_run_before(page: Page, model_url: str) -> None:
    prepare(page, model_url, 8, DOCUMENT * 14)
    page.locator("#dkv-run").click()
    expect(page.locator("#dkv-status")).to_contain_text("layer")
    page.locator("#dkv-stop").click()
    expect(page.locator("#dkv-status")).to_contain_text("Stopped while reading", timeout=30_000)
    expect(page.locator("[data-role=source]")).to_have_text("recorded on 23 November 2026")
    expect(page.locator("#dkv-run")).to_be_enabled()


def test_the_compare_endpoint_returns_a_run_record(model_url: str) -> None:
    client = Client(model_url, verbose=False)
    record = client.predict(
        document=DOCUMENT, question=QUESTION, capacity=64, max_new_tokens=4, api_name="/compare"
    )
    trace = Trace.from_dict(record)
    assert [run.method for run in trace.runs] == ["FullKV", "DynamicKV"]
    assert trace.runs[1].parameters["capacity"] == 64
    sizes = client.predict(document=DOCUMENT, question=QUESTION, api_name="/tokenize")
    assert sizes["prompt"] == trace.prompt.length
    assert {row["name"] for row in client.predict(api_name="/methods")} >= {
        "FullKV",
        "SnapKV",
        "DynamicKV",
    }
    assert client.predict(api_name="/models")[0]["state"] == "ready"
    with pytest.raises(Exception, match="Unknown method 'Magic'"):
        client.predict(document=DOCUMENT, question=QUESTION, methods=["Magic"], api_name="/compare")


def test_a_run_leaves_no_text_beyond_its_tab(page: Page, model_url: str) -> None:
    """Nor does it ask another host for anything: the fixture fails the test on that."""
    prepare(page, model_url, 2)
    page.locator("#dkv-run").click()
    expect(page.locator("#dkv-status")).to_contain_text("Done.", timeout=120_000)
    page.wait_for_function("sessionStorage.getItem('dkv-run')")
    kept = page.evaluate(
        "JSON.stringify([{...localStorage}, document.cookie, location.href, document.title])"
    )
    assert "harbour" not in kept
    assert "lamp" not in kept
    assert page.evaluate("indexedDB.databases().then(all => all.length)") == 0
    other = page.context.new_page()
    open_page(other, model_url)
    assert other.evaluate("sessionStorage.getItem('dkv-run')") is None
