"""The Learn tab in a browser, on a page without any model: every section is drawn from records,
every control does something, and the tour can be taken without a mouse.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect

from app.learn import MODELS, load_lessons
from app.learn.lessons import told_numbers, updates
from tests.browser.conftest import open_page

pytestmark = pytest.mark.browser

LESSONS = load_lessons()
NEEDLE = LESSONS["needle"]
SIDEWAYS = "document.documentElement.scrollWidth - window.innerWidth"
TOUR = "localStorage.getItem('dkv-tour')"
PAINTED = """(prefix) => [...CSS.highlights].filter(([name]) => name.startsWith(prefix))
  .reduce((sum, [, ranges]) => sum + ranges.size, 0)"""


def learn(page: Page, url: str, lesson: str = "needle", query: str = "") -> None:
    """Open a lesson by its link."""
    page.goto(f"{url}?lesson={lesson}{query}")
    expect(page.locator(".dkv-learn[data-state=ready]")).to_be_visible()
    expect(page.locator("#learn-budget .bars path").first).to_be_attached()
    expect(page.locator("#learn-pair .bars path").first).to_be_attached()


def figure(page: Page, name: str, role: str) -> Locator:
    """Something in a section's figure."""
    return page.locator(f'[data-figure="{name}"] [data-role="{role}"]')


def serious(page: Page) -> list[Any]:
    """What axe finds that matters."""
    found: dict[str, Any] = Axe().run(page).response
    return [
        (v["id"], [n["target"] for n in v["nodes"]][:4])
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]


def test_every_section_is_drawn_from_records_alone(page: Page, page_url: str) -> None:
    learn(page, page_url)
    numbers = told_numbers(NEEDLE)
    for place in page.locator(".dkv-learn > :not(.dkv-handout) [data-number]").all():
        assert place.text_content() == numbers[str(place.get_attribute("data-number"))]
    expect(figure(page, "cache", "chips").locator("span")).to_have_count(10 + 20)
    expect(figure(page, "grows", "models").locator("tr")).to_have_count(len(MODELS))
    assert page.evaluate(PAINTED, "dkv-attended") > 5
    canvases = page.locator("[data-figure=fixed] canvas")
    expect(canvases).to_have_count(4)
    blank = """(canvas) => new Set(canvas.getContext('2d')
      .getImageData(0, 0, canvas.width, canvas.height).data).size < 4"""
    assert not any(canvases.nth(i).evaluate(blank) for i in range(4))
    drawn = page.locator("#learn-budget .js-plotly-plot").evaluate(
        "(plot) => plot.data.at(-1).x.map((x, i) => x + plot.data.at(-1).base[i])"
    )
    assert drawn == NEEDLE.trace.run("DynamicKV").budgets
    rows = figure(page, "lost", "survival").locator("tbody tr")
    expect(rows).to_have_count(6)
    expect(rows.nth(1)).to_contain_text("0 of 30")
    assert page.evaluate(PAINTED, "dkv-pair") > 20
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    expect(page.locator(".dkv-model")).to_have_attribute("data-state", "failed")
    assert page.evaluate("localStorage.length") == 0


def test_the_explorer_s_marks_are_left_alone(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    before = page.evaluate(PAINTED, "dkv-kept")
    page.get_by_role("tab", name="Learn").click()
    expect(page.locator(".dkv-learn[data-state=ready]")).to_be_visible()
    assert page.evaluate(PAINTED, "dkv-kept") == before
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator(".dkv-card")).to_have_count(2)


def test_the_cache_grows_by_one_token(page: Page, page_url: str) -> None:
    learn(page, page_url)
    slider = figure(page, "cache", "token")
    slider.fill("1")
    expect(figure(page, "cache", "read")).to_have_text("2,843")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(figure(page, "cache", "read")).to_have_text("2,844")
    expect(figure(page, "cache", "with")).to_have_text("1")


def test_the_calculator_multiplies(page: Page, page_url: str) -> None:
    learn(page, page_url)
    figure(page, "grows", "model").select_option(label="Qwen2-7B-Instruct")
    figure(page, "grows", "context").fill("15")
    figure(page, "grows", "bytes").select_option("1")
    figure(page, "grows", "batch").select_option("16")
    qwen = next(model for model in MODELS if model.name == "Qwen2-7B-Instruct")
    size = qwen.cache_bytes(32768, 1, 16) / 2**30
    assert size == 14
    expect(figure(page, "grows", "product")).to_contain_text("2 × 28 layers × 4 KV heads × 128 × 1")
    expect(figure(page, "grows", "product")).to_contain_text("= 14 GiB")
    expect(figure(page, "grows", "models").locator("tr.dkv-chosen td").last).to_have_text("14 GiB")


def test_scores_change_with_the_layer(page: Page, page_url: str) -> None:
    learn(page, page_url)
    note = figure(page, "attended", "attended-note")
    for layer in (0, 29):
        figure(page, "attended", "layer").fill(str(layer))
        first, window, tenth = NEEDLE.behind["attention"][layer]
        expect(note).to_contain_text(
            f"Layer {layer}: of the window's attention {100 * first:.0f} % goes to the first token, "
            f"{100 * window:.0f} % stays in the window, {100 * tenth:.0f} % goes"
        )
    text = figure(page, "attended", "text")
    assert text.evaluate("(box) => box.textContent") == NEEDLE.trace.prompt.text
    assert text.evaluate("(box) => box.scrollTop") > 100, "the evidence is in sight"


def test_the_maps_zoom_to_the_evidence(page: Page, page_url: str) -> None:
    learn(page, page_url)
    figure(page, "fixed", "zoom").select_option("near")
    expect(figure(page, "fixed", "fixed-note")).to_contain_text("positions 1,137 to 1,245")
    size = page.locator("[data-figure=fixed] canvas").first
    assert size.evaluate("(canvas) => canvas.width") == 1245 - 1137 + 1


def test_the_film_shows_the_numbers_of_every_update(page: Page, page_url: str) -> None:
    learn(page, page_url)
    steps = updates(NEEDLE)
    words = page.locator("#learn-budget")
    words.locator("[data-role=row]").select_option("3")
    for update in (0, 5):
        figure(page, "budget", "update").fill(str(update))
        step = steps[update]
        expect(words.locator("[data-role=claim]")).to_contain_text(f"→ {step['claims'][3]:,}")
        expect(words.locator("[data-role=correction]")).to_have_text(
            f"{sum(step['claims']):,} ÷ 11,280 = {step['excess']:.4f}"
        )
        expect(words.locator("[data-role=budget]")).to_contain_text(f"→ {step['budgets'][3]:,}")
        expect(words.locator("[data-role=sum]")).to_have_text("11,280 = 376 × 30")
        page.wait_for_function(
            "(seen) => document.querySelector('#learn-budget .js-plotly-plot').data.at(-1).x"
            ".filter((x) => x > 0).length === seen",
            arg=len(step["budgets"]),
        )
    symbol = words.locator('.dkv-symbol[data-symbol="rho"]').first
    symbol.hover()
    tip = page.locator(".dkv-learn-tip")
    expect(tip).to_contain_text(f"ρ = {steps[5]['excess']:.4f}")
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    symbol.focus()
    expect(tip).to_be_visible()
    expect(symbol).to_have_attribute("aria-describedby", "dkv-learn-tip")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_words_are_explained_where_they_stand(page: Page, page_url: str) -> None:
    learn(page, page_url)
    terms = page.locator(".dkv-term")
    assert terms.count() > 8
    for i in range(terms.count()):
        term = terms.nth(i)
        if not term.is_visible():  # in the maths, which is folded
            continue
        term.focus()
        entry = page.locator(f'[data-entry="{term.get_attribute("data-term")}"] dd')
        expect(page.locator(".dkv-learn-tip")).to_have_text(entry.inner_text())


def test_an_answer_and_where_it_parts(page: Page, page_url: str) -> None:
    learn(page, page_url, "code")
    lesson = LESSONS["code"]
    figure(page, "lost", "method").select_option("PyramidKV")
    expect(figure(page, "lost", "answer").locator("mark")).to_have_text("1")
    expect(figure(page, "lost", "answer")).to_contain_text(lesson.trace.run("PyramidKV").answer)
    expect(figure(page, "lost", "lost-note")).to_contain_text("They part at token 14")
    link = figure(page, "lost", "lost-note").get_by_role("link")
    assert link.get_attribute("href") == "?ex=code&m=dynamickv"
    figure(page, "lost", "method").select_option("SnapKV")
    expect(figure(page, "lost", "lost-note")).to_contain_text("never leaves FullKV's")


def test_predict_then_reveal(page: Page, page_url: str) -> None:
    learn(page, page_url)
    reveal, verdict = page.locator("[data-role=reveal]"), page.locator("[data-role=verdict]")
    expect(reveal).to_be_disabled()
    expect(verdict.locator("table")).to_have_count(0)
    box = page.locator(".dkv-sentences")
    box.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    expect(box.locator("[aria-selected=true]")).to_have_count(1)
    box.get_by_text("The brass key to the clock tower").click()
    expect(box.locator("[aria-selected=true]")).to_have_count(2)
    reveal.click()
    expect(verdict).to_contain_text("You kept the evidence.")
    # The same overlap, from the record.
    prompt = NEEDLE.trace.prompt
    first, last = prompt.document_span
    chosen = np.zeros(prompt.length, bool)
    for text in box.locator("[aria-selected=true]").all_inner_texts():
        at = prompt.text.index(text)
        start, end = (len(prompt.text[:i].encode("utf-16-le")) // 2 for i in (at, at + len(text)))
        chosen |= [a >= start and a < end for a, _ in prompt.text_utf16_offsets]
    for run in NEEDLE.trace.runs[1:]:
        kept = run.retained.unpack(30, prompt.length)[:, :, first:last].sum(axis=(0, 1))
        share = 100 * kept[chosen[first:last]].sum() / kept.sum()
        shown = verdict.locator(f"[data-overlap={run.method}]").inner_text()
        assert float(shown.rstrip(" %")) == pytest.approx(share, abs=0.3)
    page.locator("[data-role=again]").click()
    expect(box.locator("[aria-selected=true]")).to_have_count(0)


def test_no_more_is_marked_than_the_budget_allows(page: Page, page_url: str) -> None:
    learn(page, page_url)
    sentences = page.locator(".dkv-sentences [role=option]")
    for i in range(1, 40):
        sentences.nth(i).dispatch_event("click")
    expect(page.locator("[data-role=spent-label]")).to_contain_text("Full: this sentence has")
    marked = page.evaluate(
        "document.querySelector('[data-role=spent]').value / document.querySelector('[data-role=spent]').max"
    )
    assert 0.9 < marked <= 1


def test_two_questions_part_by_layer(page: Page, page_url: str) -> None:
    learn(page, page_url)
    before = page.evaluate(PAINTED, "dkv-pair")
    page.locator("[data-role=pair-layer]").fill("0")
    expect(page.locator("[data-role=pair-label]")).to_have_text("0: 662 for A, 540 for B")
    assert page.evaluate(PAINTED, "dkv-pair") != before
    expect(page.locator("#learn-pair")).to_contain_text("What is the egg timer shaped like?")


@pytest.mark.parametrize("lesson", ["summary", "code"])
def test_a_link_opens_its_lesson(page: Page, page_url: str, lesson: str) -> None:
    learn(page, page_url, lesson)
    expect(page.locator("[data-role=lessons] [aria-pressed=true]")).to_have_text(
        LESSONS[lesson].title
    )
    question = page.locator("#learn-teach details").first
    expect(question.locator("p")).to_be_hidden()
    question.locator("summary").click()
    expect(question.locator("p")).to_be_visible()
    page.locator("[data-role=lessons] button", has_text="Needle").click()
    expect(page.locator("#learn-budget [data-number=total]")).to_have_text("11,280")
    assert "lesson=needle" in page.url
    page.reload()
    expect(page.locator("[data-role=lessons] [aria-pressed=true]")).to_have_text("Needle")


@pytest.mark.parametrize(("width", "query"), [(1400, "&__theme=dark"), (390, ""), (1600, "&big=1")])
def test_it_fits_the_screen_and_charts_have_their_width(
    page: Page, page_url: str, tmp_path: Path, width: int, query: str
) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    learn(page, page_url, query=query)
    page.screenshot(path=tmp_path / f"learn-{width}.png", full_page=True)
    assert page.evaluate(SIDEWAYS) <= 0
    for plot in page.locator(".dkv-learn .js-plotly-plot").all():
        box, inner = plot.bounding_box(), plot.locator(".main-svg").first.bounding_box()
        assert box is not None
        assert inner is not None
        assert 0.4 * min(width, 1000) < inner["width"] <= width
        assert inner["width"] == pytest.approx(box["width"], rel=0.02)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_learn(page: Page, page_url: str, theme: str) -> None:
    learn(page, page_url, query=f"&__theme={theme}")
    page.locator(".dkv-sentences [role=option]").nth(3).click()
    page.locator("[data-role=reveal]").click()
    for fold in page.locator(".dkv-learn details > summary").all():
        fold.click()
    page.locator(".dkv-term").first.focus()
    page.wait_for_timeout(300)
    assert serious(page) == []


def test_the_handout_is_one_page(page: Page, page_url: str) -> None:
    for lesson in ("needle", "summary"):
        learn(page, page_url, lesson)
        expect(page.locator(".dkv-handout")).to_be_hidden()
        pages = re.findall(rb"/Type /Page\b", page.pdf(format="A4"))
        assert len(pages) == 1
        expect(page.locator(".dkv-handout")).to_be_hidden()


def test_the_tour_is_taken_by_keyboard_alone(page: Page, page_url: str) -> None:
    learn(page, page_url)
    button = page.locator(".dkv-learn [data-tour=start]")
    button.focus()
    page.keyboard.press("Enter")
    tour = page.get_by_role("dialog", name="A document")
    expect(tour).to_be_visible()
    expect(page.locator(".dkv-tour-next")).to_be_focused()
    total = int(page.locator(".dkv-tour-place").inner_text().split(" of ")[1])
    assert total >= 10
    for number in range(2, total + 1):
        page.keyboard.press("ArrowRight" if number % 2 else "Enter")
        expect(page.locator(".dkv-tour-place")).to_have_text(f"{number} of {total}")
        framed, at = page.locator(".dkv-tour-frame").bounding_box(), page.locator(".dkv-tour")
        assert framed is not None
        assert framed["width"] > 40
        expect(at).to_be_in_viewport(ratio=1)
    assert page.evaluate("window.DynamicKV.store.view.layer") is None, "arrows moved the tour only"
    page.keyboard.press("Enter")
    expect(page.locator(".dkv-tour")).to_have_count(0)
    assert page.evaluate(TOUR) == "done"
    expect(page.locator("#dkv-model [data-tour=start]")).to_be_focused()


def test_the_tour_is_left_and_resumed(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    expect(page.locator(".dkv-tour")).to_have_count(0)
    button = page.locator("#dkv-model [data-tour=start]")
    button.click()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert serious(page) == []
    page.keyboard.press("Escape")
    expect(page.locator(".dkv-tour")).to_have_count(0)
    expect(button).to_be_focused()
    page.reload()
    expect(button).to_have_text("Continue the tour (4 of 12)")
    expect(page.locator(".dkv-tour")).to_have_count(0)
    button.click()
    expect(page.locator(".dkv-tour-place")).to_have_text("4 of 12")
    page.get_by_role("button", name="Skip").click()
    expect(page.locator(".dkv-tour")).to_have_count(0)


def test_the_tour_opens_by_itself_once_at_most(page: Page, page_url: str) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{page_url}?tour=1")
    expect(page.locator(".dkv-tour")).to_be_in_viewport(ratio=1)
    page.keyboard.press("Escape")
    page.goto(f"{page_url}?tour=1")
    expect(page.locator(".dkv-card")).to_have_count(2)
    page.wait_for_function("window.DynamicKV.store.trace")
    expect(page.locator(".dkv-tour")).to_have_count(0)
