"""The page with recorded runs and no model at all: first paint, reading, linking, torture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.examples import Example
from app.wording import percent
from dynamickv.record.trace import Trace
from tests.browser.conftest import HOSTILE, open_page, pick

pytestmark = pytest.mark.browser

TWO_FRAMES = """async (layers) => {
  const slider = document.querySelector('.dkv-controls [data-role=slider]');
  const times = [];
  for (let layer = 1; layer < layers; layer += 1) {
    const start = performance.now();
    slider.value = layer;
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    times.push(performance.now() - start);
  }
  // Up to the second frame after it: painted. The lower quartile, because test machines are shared.
  return times.sort((a, b) => a - b)[Math.floor(times.length / 4)];
}"""


CUT_OR_WRAPPED = """[...document.querySelectorAll(
  '.dkv-card :is(h3, .dkv-finish, .dkv-expected span, dt, b)')]
  .filter((node) => node.scrollWidth > node.clientWidth + 1 && node.clientWidth
    || node.offsetHeight > 1.6 * parseFloat(getComputedStyle(node).lineHeight))
  .map((node) => node.textContent)"""
"""Texts on the cards that are clipped or take more than one line."""


def highlights(page: Page) -> dict[str, int]:
    """Ranges per registered highlight."""
    found: dict[str, int] = page.evaluate(
        "Object.fromEntries([...CSS.highlights].map(([name, h]) => [name, h.size]))"
    )
    return found


def point_at_text(page: Page, x: int = 40, y: int = 12) -> None:
    """Move the pointer to a place in the document's text."""
    text = page.locator(".dkv-text[data-role=text]")
    page.locator(".dkv-scroll").scroll_into_view_if_needed()
    box = text.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + x, box["y"] + y)


def test_first_paint_is_a_recorded_run(page: Page, page_url: str) -> None:
    page.goto(page_url)
    expect(page.locator(".dkv-card")).to_have_count(2)
    expect(page.locator(".js-plotly-plot .bars path").first).to_be_attached()
    expect(page.locator("[data-role=source]")).to_have_text("recorded on 23 November 2026")
    expect(page.locator(".dkv-card[data-method=DynamicKV] .dkv-chip")).to_have_text(
        "compressed at 30 of 30 layers"
    )
    lost = page.locator(".dkv-card[data-method=DynamicKV] .dkv-glow")
    expect(lost).to_have_text(["old", "bridge"])
    assert sum(highlights(page).values()) > 50
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    expect(page.locator(".dkv-model")).to_have_attribute("data-state", "failed")
    expect(page.locator(".dkv-model")).to_contain_text("no network")
    assert page.evaluate("localStorage.length") == 0


def test_a_small_probability_tells_from_its_half(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    shares = [0.0014, 0.0007, 0.0002, 0.0001, 4e-7]
    words = page.evaluate("(shares) => shares.map(DynamicKV.percent)", shares)
    assert words == [percent(share) for share in shares]
    assert page.evaluate("DynamicKV.percent(0)") == "0 %"


@pytest.mark.parametrize(("theme", "width"), [("light", 1366), ("dark", 1400), ("light", 390)])
def test_it_fits_the_screen(
    page: Page, page_url: str, tmp_path: Path, theme: str, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 850})
    open_page(page, page_url, f"?__theme={theme}")
    page.screenshot(path=tmp_path / f"{theme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    plot = page.locator(".dkv-plot").bounding_box()
    assert plot is not None
    assert 200 < plot["width"] < width
    pick(page, "Three")
    expect(page.locator(".dkv-card")).to_have_count(3)
    assert page.evaluate(CUT_OR_WRAPPED) == []
    advanced = page.get_by_role("button", name="Advanced settings")
    if width < 1100:  # there the form is folded and answers come first
        expect(advanced).to_be_hidden()
        page.get_by_role("button", name="Text, question and settings").click()
    expect(advanced).to_be_visible()
    if width > 1100:  # nothing of the form lies under the Run bar
        bottom = advanced.evaluate("node => node.getBoundingClientRect().bottom")
        run = page.locator("#dkv-run").bounding_box()
        assert run is not None
        assert bottom <= run["y"]
        assert run["y"] + run["height"] <= 850
    advanced.click()
    page.evaluate("window.scrollTo(0, 1000)")
    if width > 1100:  # the form comes along
        expect(page.locator("#dkv-run")).to_be_in_viewport(ratio=1)


def test_the_chart_follows_the_theme_live(page: Page, page_url: str) -> None:
    open_page(page, page_url, "?__theme=light")
    color = "document.querySelector('.dkv-plot').layout.font.color"
    before = page.evaluate(color)
    page.evaluate("document.body.classList.add('dark')")
    page.wait_for_function(f"{color} !== '{before}'")
    assert (
        page.evaluate("document.querySelector('.dkv-plot').layout.paper_bgcolor") == "rgba(0,0,0,0)"
    )


@pytest.mark.timed
def test_the_layer_slider_is_quick_at_8k_tokens(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Long")
    expect(page.locator(".dkv-fold").last).to_contain_text("tokens")
    page.wait_for_function("window.DynamicKV.store.trace.prompt.length > 7900")
    assert page.evaluate(TWO_FRAMES, 30) < 2 * 50
    expect(page.locator(".dkv-controls [data-role=where]")).to_contain_text("layer 29")


def test_a_layer_shows_exactly_what_it_keeps(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    trace = recorded["ordinary"].trace
    assert trace is not None
    open_page(page, page_url)
    page.evaluate("window.DynamicKV.setLayer(12)")
    kept = trace.run("DynamicKV").retained.unpack(30, trace.prompt.length)[12].any(axis=0)
    shown = page.evaluate(
        """() => { let units = 0;
        for (const [name, h] of CSS.highlights) if (name.startsWith('dkv-kept'))
          for (const range of h) units += range.endOffset - range.startOffset;
        return units; }"""
    )
    offsets = trace.prompt.text_utf16_offsets
    assert shown == sum(
        end - start for (start, end), keep in zip(offsets, kept, strict=True) if keep
    )


def test_keys_and_links_move_everything(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    where = page.locator(".dkv-controls [data-role=where]")
    page.locator(".dkv-scroll").focus()
    page.keyboard.press("ArrowRight")
    expect(where).to_contain_text("layer 0")
    page.keyboard.press("ArrowLeft")
    expect(where).to_have_text("all 30 layers")
    page.keyboard.press("[")
    expect(page.locator(".dkv-document .dkv-tabs [aria-pressed=true]")).to_contain_text("FullKV")
    page.keyboard.press("]")
    point_at_text(page)
    expect(page.locator(".dkv-tip")).to_contain_text("of 30 layers")
    assert highlights(page)["dkv-hover"] == 1
    expect(page.locator(".dkv-map-cursor")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".dkv-tip")).to_be_hidden()
    page.locator(".dkv-map canvas").click(position={"x": 200, "y": 93})
    expect(where).to_contain_text("layer 15")


def test_every_view_has_its_tab(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.get_by_role("button", name="Along the document").click()
    expect(page.locator(".js-plotly-plot .scatterlayer path").first).to_be_attached()


def test_hostile_text_stays_text(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Hostile")
    shown = "document.querySelector('.dkv-text[data-role=text]').textContent"
    page.wait_for_function(f"{shown}.includes('pwned')")
    assert page.evaluate(shown) == HOSTILE
    expect(page.locator(".dkv-answer").first).to_contain_text("${window.pwned=1}")
    assert page.evaluate("window.pwned") is None
    assert page.locator(".dkv-panel img, .dkv-answers img, .dkv-panel script").count() == 0


def test_copying_gives_the_text_back(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Hostile")
    page.wait_for_function(
        "document.querySelector('.dkv-text[data-role=text]').textContent.includes('pwned')"
    )
    page.evaluate(
        "getSelection().selectAllChildren(document.querySelector('.dkv-text[data-role=text]'))"
    )
    page.evaluate(
        """addEventListener('copy', (e) => {
        window.copied = e.clipboardData.getData('text/plain'); })"""
    )
    page.evaluate("document.execCommand('copy')")
    assert page.evaluate("window.copied") == HOSTILE


def test_without_the_highlight_api_spans_say_the_same(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    page.add_init_script("delete window.Highlight")
    open_page(page, page_url)
    text = page.evaluate("document.querySelector('.dkv-text[data-role=text]').textContent")
    assert text == recorded["ordinary"].document
    assert page.locator(".dkv-text [class^=dkv-span]").count() > 50
    point_at_text(page)
    expect(page.locator(".dkv-tip")).to_contain_text("of 30 layers")


def test_a_prompt_that_fits_is_loud(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Fits")
    expect(page.locator(".dkv-loud")).to_contain_text("Nothing to compress")
    expect(page.locator(".dkv-card[data-method=DynamicKV] .dkv-chip")).to_have_text(
        "nothing to compress: the prompt fits"
    )


def test_run_waits_for_a_text_and_a_question(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    run = page.locator("#dkv-run")
    expect(run).to_be_enabled()
    for field, value in (("document", ""), ("document", " \n "), ("question", "   ")):
        box = page.locator(f"#dkv-{field} textarea")
        before = box.input_value()
        box.fill(value)
        expect(run).to_be_disabled()
        box.fill(before)
        expect(run).to_be_enabled()


def test_bad_texts_get_one_sentence_said_once_and_are_kept(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    box = page.locator("#dkv-document textarea")
    for value, sentence in (
        ("Short text.", "The question is longer than the document"),
        ("a" * 5_000_000, "5,000,000 characters"),
    ):
        box.fill(value)
        page.locator("#dkv-run").click()
        said = page.locator(".dkv-status[data-state=error]")
        expect(said).to_contain_text(sentence)
        expect(page.get_by_text(said.inner_text(), exact=True)).to_have_count(1)
        expect(page.locator(".toast-body")).to_have_count(0)
        expect(page.locator("#dkv-run")).to_be_enabled()
        assert box.evaluate("(box) => box.value.length") == len(value)
        expect(page.locator("[data-role=source]")).to_have_text("recorded on 23 November 2026")


def test_fullkv_cannot_be_left_out(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    box = page.get_by_label("FullKV", exact=True)
    box.click()
    expect(box).to_be_checked()


def test_run_stays_in_sight_with_all_settings_open(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.locator("#dkv-advanced > button").click()
    expect(page.get_by_role("spinbutton", name="Update interval")).to_be_visible()
    expect(page.locator("#dkv-run")).to_be_in_viewport(ratio=1)


def test_a_capacity_below_the_window_names_both(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    box = page.locator("#dkv-capacity input[type=number]")
    box.fill("8")
    box.blur()
    # The form knows it: on a busy machine a click came sooner, and ran with the capacity before.
    page.wait_for_url("**/?*b=8*")
    page.locator("#dkv-run").click()
    said = page.locator(".dkv-status[data-state=error]")
    expect(said).to_contain_text("Capacity must exceed Window size 8 tokens, got 8.")


def test_the_slider_offers_no_capacity_that_the_window_forbids(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    slider = page.locator("#dkv-capacity input[type=range]")
    slider.press("Home")
    expect(page.locator("#dkv-capacity input[type=number]")).to_have_value("16")
    expect(page.locator("#dkv-capacity [data-testid=min-value]")).to_have_text("16")


def test_a_missing_model_is_one_sentence(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.locator("#dkv-run").click()
    expect(page.locator(".dkv-status[data-state=error]")).to_contain_text("there is no network.")
    expect(page.locator("#dkv-run")).to_be_enabled()
    expect(page.locator("[data-role=source]")).to_have_text("recorded on 23 November 2026")


def test_a_binary_upload_is_refused_and_the_text_kept(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    open_page(page, page_url)
    upload = page.locator("#dkv-upload input[type=file], input[type=file][accept*='.md']").first
    upload.set_input_files(
        {"name": "photo.txt", "mimeType": "text/plain", "buffer": b"\x89PNG\0" * 99}
    )
    expect(page.get_by_text("does not look like text")).to_be_visible()
    assert page.locator("#dkv-document textarea").input_value() == recorded["ordinary"].document
    upload.set_input_files(
        {"name": "a.md", "mimeType": "text/markdown", "buffer": "Grüße 🌊".encode()}
    )
    expect(page.locator("#dkv-document textarea")).to_have_value("Grüße 🌊")


def test_a_run_is_saved_opened_and_checked(
    page: Page, page_url: str, recorded: dict[str, Example], tmp_path: Path
) -> None:
    open_page(page, page_url)
    page.get_by_role("tab", name="Runs & API").click()
    with page.expect_download() as download:
        page.locator("#dkv-save").click()
    assert download.value.suggested_filename == "dynamickv_synthetic-model_b96_2026-11-23.json.gz"
    download.value.save_as(tmp_path / "run.json.gz")
    trace = Trace.load(tmp_path / "run.json.gz")
    assert trace == recorded["ordinary"].trace
    record = trace.to_dict()
    record["prompt"]["question"] = "Opened from a file?"
    (tmp_path / "run.json").write_text(json.dumps(record))
    opener = page.locator("input[type=file][accept*='.json']").first
    opener.set_input_files({"name": "bad.json", "mimeType": "application/json", "buffer": b"{}"})
    expect(page.get_by_text("schema")).to_be_visible()
    expect(page.get_by_role("tab", name="Explore")).to_have_attribute("aria-selected", "false")
    opener.set_input_files(tmp_path / "run.json")
    expect(page.get_by_role("tab", name="Explore")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".dkv-answers h2")).to_have_text("Opened from a file?")
    expect(page.locator("#dkv-open-note")).to_contain_text("Opened.")
