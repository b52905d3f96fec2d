"""The Learn tab in a browser, on a page without any model: every section is drawn from records,
every control does something, and the tour can be taken without a mouse. Loading the page is what
takes time, so that most tests look at one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from app.learn import MODELS, load_lessons
from app.learn.view_model import told_numbers, updates
from tests.browser.conftest import LOCAL, open_page

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


@pytest.fixture(scope="module")
def opened(browser: Browser, page_url: str) -> Iterator[tuple[Page, list[str]]]:
    """One tab, opened by a link to the first lesson, and what went wrong in it."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: None if LOCAL.match(r.url) else problems.append(r.url))
    learn(page, page_url)
    yield page, problems
    context.close()


@pytest.fixture
def needle(opened: tuple[Page, list[str]]) -> Iterator[Page]:
    """That tab, at the first lesson."""
    page, problems = opened
    page.set_viewport_size({"width": 1400, "height": 900})
    yield page
    page.evaluate("document.body.classList.remove('dark')")
    assert not problems, problems[:5]


def figure(page: Page, name: str, role: str) -> Locator:
    """Something in a section's figure."""
    return page.locator(f'[data-figure="{name}"] [data-role="{role}"]')


def serious(page: Page, within: str) -> list[Any]:
    """What axe finds that matters."""
    found: dict[str, Any] = Axe().run(page, within).response
    return [
        (v["id"], [n["target"] for n in v["nodes"]][:4])
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]


def test_every_section_is_drawn_from_records_alone(needle: Page) -> None:
    numbers = told_numbers(NEEDLE)
    for place in needle.locator(".dkv-learn > :not(.dkv-handout) [data-number]").all():
        assert place.text_content() == numbers[str(place.get_attribute("data-number"))]
    expect(figure(needle, "cache", "chips").locator("span")).to_have_count(10 + 20)
    expect(figure(needle, "grows", "models").locator("tr")).to_have_count(len(MODELS))
    assert needle.evaluate(PAINTED, "dkv-attended") > 5
    canvases = needle.locator("[data-figure=fixed] canvas")
    expect(canvases).to_have_count(4)
    blank = """(canvas) => new Set(canvas.getContext('2d')
      .getImageData(0, 0, canvas.width, canvas.height).data).size < 4"""
    assert not any(canvases.nth(i).evaluate(blank) for i in range(4))
    drawn = needle.locator("#learn-budget .js-plotly-plot").evaluate(
        "(plot) => plot.data.at(-1).x.map((x, i) => x + plot.data.at(-1).base[i])"
    )
    assert drawn == NEEDLE.trace.run("DynamicKV").budgets
    rows = figure(needle, "lost", "survival").locator("tbody tr")
    expect(rows).to_have_count(6)
    expect(rows.nth(1)).to_contain_text("0 of 30")
    assert needle.evaluate(PAINTED, "dkv-pair") > 20
    assert needle.evaluate("document.querySelectorAll('*').length") < 3300
    expect(needle.locator(".dkv-model")).to_have_attribute("data-state", "failed")
    assert needle.evaluate("localStorage.length") == 0


def test_the_explorer_s_marks_are_left_alone(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    before = page.evaluate(PAINTED, "dkv-kept")
    page.get_by_role("tab", name="Learn").click()
    expect(page.locator(".dkv-learn[data-state=ready]")).to_be_visible()
    assert page.evaluate(PAINTED, "dkv-kept") == before
    page.locator("[data-figure=attended] [data-role=text]").focus()
    for key in ("ArrowRight", "[", "/"):
        page.keyboard.press(key)
    assert page.evaluate("window.DynamicKV.store.view.layer") is None
    assert page.evaluate("window.DynamicKV.store.view.run") == 1
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator(".dkv-card")).to_have_count(2)


def test_the_cache_grows_by_one_token(needle: Page) -> None:
    slider = figure(needle, "cache", "token")
    slider.fill("1")
    expect(figure(needle, "cache", "read")).to_have_text("2,843")
    slider.focus()
    needle.keyboard.press("ArrowRight")
    expect(figure(needle, "cache", "read")).to_have_text("2,844")
    expect(figure(needle, "cache", "with")).to_have_text("1")


def test_the_calculator_multiplies(needle: Page) -> None:
    figure(needle, "grows", "model").select_option(label="Qwen2-7B-Instruct")
    figure(needle, "grows", "context").fill("15")
    figure(needle, "grows", "bytes").select_option("1")
    figure(needle, "grows", "batch").select_option("16")
    qwen = next(model for model in MODELS if model.name == "Qwen2-7B-Instruct")
    size = qwen.cache_bytes(32768, 1, 16) / 2**30
    assert size == 14
    expect(figure(needle, "grows", "product")).to_contain_text("28 layers")
    expect(figure(needle, "grows", "product")).to_contain_text("= 14 GiB")
    expect(figure(needle, "grows", "models").locator("tr.dkv-chosen td").last).to_have_text(
        "14 GiB"
    )


def test_scores_change_with_the_layer(needle: Page) -> None:
    note = figure(needle, "attended", "attended-note")
    for layer in (0, 29):
        figure(needle, "attended", "layer").fill(str(layer))
        first, window, tenth = NEEDLE.behind["attention"][layer]
        expect(note).to_contain_text(
            f"Layer {layer}: of the window's attention {100 * first:.0f} % goes to the first "
            f"token, {100 * window:.0f} % stays in the window, {100 * tenth:.0f} % goes"
        )
    text = figure(needle, "attended", "text")
    assert text.evaluate("(box) => box.textContent") == NEEDLE.trace.prompt.text
    assert text.evaluate("(box) => box.scrollTop") > 100, "the evidence is in sight"


def test_the_maps_zoom_to_the_evidence(needle: Page) -> None:
    figure(needle, "fixed", "zoom").select_option("near")
    first, last = NEEDLE.spans[0]
    note = f"positions {first - 45:,} to {last + 44:,}"
    expect(figure(needle, "fixed", "fixed-note")).to_contain_text(note)
    size = needle.locator("[data-figure=fixed] canvas").first
    assert size.evaluate("(canvas) => canvas.width") == last - first + 90


def test_the_film_shows_the_numbers_of_every_update(needle: Page) -> None:
    steps = updates(NEEDLE)
    words = needle.locator("#learn-budget")
    words.locator("[data-role=row]").select_option("3")
    for update in (0, 5):
        figure(needle, "budget", "update").fill(str(update))
        step = steps[update]
        expect(words.locator("[data-role=claim]")).to_contain_text(f"→ {step['claims'][3]:,}")
        expect(words.locator("[data-role=correction]")).to_have_text(
            f"{sum(step['claims']):,} ÷ 11,280 = {step['excess']:.4f}"
        )
        expect(words.locator("[data-role=budget]")).to_contain_text(f"→ {step['budgets'][3]:,}")
        expect(words.locator("[data-role=sum]")).to_have_text(re.compile("^11,280 = 376 . 30$"))
        needle.wait_for_function(
            "(seen) => document.querySelector('#learn-budget .js-plotly-plot').data.at(-1).x"
            ".filter((x) => x > 0).length === seen",
            arg=len(step["budgets"]),
        )
    symbol = words.locator('.dkv-symbol[data-symbol="rho"]').first
    symbol.hover()
    tip = needle.locator(".dkv-learn-tip")
    expect(tip).to_contain_text(f"= {steps[5]['excess']:.4f}")
    needle.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    symbol.focus()
    expect(tip).to_be_visible()
    expect(symbol).to_have_attribute("aria-describedby", "dkv-learn-tip")
    needle.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_words_are_explained_where_they_stand(needle: Page) -> None:
    terms = needle.locator(".dkv-term")
    assert terms.count() > 8
    for i in range(terms.count()):
        term = terms.nth(i)
        if not term.is_visible():  # in the maths, which is folded
            continue
        term.focus()
        entry = needle.locator(f'[data-entry="{term.get_attribute("data-term")}"] dd')
        expect(needle.locator(".dkv-learn-tip")).to_have_text(entry.inner_text())


def test_predict_then_reveal(needle: Page) -> None:
    reveal, verdict = needle.locator("[data-role=reveal]"), needle.locator("[data-role=verdict]")
    expect(reveal).to_be_disabled()
    expect(verdict.locator("table")).to_have_count(0)
    box = needle.locator(".dkv-sentences")
    box.focus()
    needle.keyboard.press("ArrowDown")
    needle.keyboard.press("ArrowDown")
    needle.keyboard.press("Space")
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
    needle.locator("[data-role=again]").click()
    expect(box.locator("[aria-selected=true]")).to_have_count(0)


def test_no_more_is_marked_than_the_budget_allows(needle: Page) -> None:
    sentences = needle.locator(".dkv-sentences [role=option]")
    for i in range(1, 40):
        sentences.nth(i).dispatch_event("click")
    expect(needle.locator("[data-role=spent-label]")).to_contain_text("Full: this sentence has")
    spent = needle.locator("[data-role=spent]")
    assert 0.9 < spent.evaluate("(meter) => meter.value / meter.max") <= 1
    needle.locator("[data-role=again]").click()


def test_two_questions_part_by_layer(needle: Page) -> None:
    before = needle.evaluate(PAINTED, "dkv-pair")
    needle.locator("[data-role=pair-layer]").fill("0")
    expect(needle.locator("[data-role=pair-label]")).to_have_text("0: 662 for A, 540 for B")
    assert needle.evaluate(PAINTED, "dkv-pair") != before
    expect(needle.locator("#learn-pair")).to_contain_text("What is the egg timer shaped like?")


def test_a_link_opens_its_lesson(page: Page, page_url: str) -> None:
    learn(page, page_url, "code", "&big=1")
    lesson = LESSONS["code"]
    chosen = page.locator("[data-role=lessons] [aria-pressed=true]")
    expect(chosen).to_have_text(lesson.title)
    assert page.evaluate(SIDEWAYS) <= 0
    question = page.locator("#learn-teach details").first
    expect(question.locator("p")).to_be_hidden()
    question.locator("summary").click()
    expect(question.locator("p")).to_be_visible()
    figure(page, "lost", "method").select_option("PyramidKV")
    held = lesson.trace.run("PyramidKV").aligned
    assert held is not None
    assert held.loss is not None
    first, last = held.token_spans[held.loss]
    lost = "".join(lesson.trace.run("FullKV").pieces[first:last]).strip()
    expect(figure(page, "lost", "answer").locator("mark")).to_have_text(lost)
    expect(figure(page, "lost", "lost-note")).to_contain_text(f"carried by “{lost}”")
    expect(figure(page, "lost", "answer")).to_contain_text(lesson.trace.run("PyramidKV").answer)
    expect(figure(page, "lost", "lost-note")).to_contain_text("They part at token 14")
    link = figure(page, "lost", "lost-note").get_by_role("link")
    assert link.get_attribute("href") == "?ex=code&m=dynamickv&big=1"
    figure(page, "lost", "method").select_option("SnapKV")
    expect(figure(page, "lost", "lost-note")).to_contain_text("never leaves FullKV's")
    page.locator("[data-role=lessons] button", has_text="Summary").click()
    expect(page.locator("#learn-budget [data-number=total]")).to_have_text("7,440")
    assert "lesson=summary" in page.url
    assert "big=1" in page.url


@pytest.mark.parametrize(("width", "dark"), [(1400, True), (390, False), (1000, False)])
def test_it_fits_the_screen_and_charts_have_their_width(
    needle: Page, tmp_path: Path, width: int, dark: bool
) -> None:
    needle.set_viewport_size({"width": width, "height": 900})
    needle.evaluate("(dark) => document.body.classList.toggle('dark', dark)", dark)
    needle.wait_for_function(
        """() => [...document.querySelectorAll('.dkv-learn .js-plotly-plot')].every((plot) =>
        Math.abs(plot.querySelector('.main-svg').clientWidth - plot.clientWidth) < 3)"""
    )
    needle.screenshot(path=tmp_path / f"learn-{width}.png", full_page=True)
    assert needle.evaluate(SIDEWAYS) <= 0
    for plot in needle.locator(".dkv-learn .js-plotly-plot").all():
        box = plot.bounding_box()
        assert box is not None
        assert 0.35 * min(width, 1100) < box["width"] <= width
    ink = "document.querySelector('.dkv-learn .js-plotly-plot').layout.font.color"
    shown = needle.evaluate("getComputedStyle(document.body).getPropertyValue('--dkv-muted')")
    needle.wait_for_function(f"{ink} === '{shown.strip()}'")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_learn(needle: Page, theme: str) -> None:
    needle.evaluate("(dark) => document.body.classList.toggle('dark', dark)", theme == "dark")
    needle.locator("[data-role=again]").click()
    needle.locator(".dkv-sentences [role=option]").nth(3).click()
    needle.locator("[data-role=reveal]").click()
    folds = "document.querySelectorAll('.dkv-learn details').forEach((d) => { d.open = OPEN; })"
    needle.evaluate(folds.replace("OPEN", "true"))
    needle.locator(".dkv-term").first.focus()
    needle.wait_for_timeout(300)  # colours stop changing
    assert serious(needle, ".dkv-learn") == []
    needle.evaluate(folds.replace("OPEN", "false"))


@pytest.mark.parametrize("lesson", ["Code", "Summary", "Needle"])
def test_the_handout_is_one_page(needle: Page, lesson: str) -> None:
    needle.locator("[data-role=lessons] button", has_text=lesson).click()
    expect(needle.locator("[data-role=lessons] [aria-pressed=true]")).to_have_text(lesson)
    expect(needle.locator(".dkv-handout")).to_be_hidden()
    assert len(re.findall(rb"/Type /Page\b", needle.pdf(format="A4"))) == 1
    expect(needle.locator(".dkv-handout")).to_be_hidden()


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
    middle = page.evaluate("Math.floor(window.DynamicKV.store.trace.layers / 2)")
    layer = "window.DynamicKV.store.view.layer"
    assert page.evaluate(layer) == middle, "the tour chose it, and arrows moved the tour only"
    page.keyboard.press("Enter")
    expect(page.locator(".dkv-tour")).to_have_count(0)
    assert page.evaluate(layer) is None, "the page is put back"
    assert page.evaluate(TOUR) == "done"
    expect(page.locator("#dkv-model [data-tour=start]")).to_be_focused()


def test_the_tour_is_left_and_resumed(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    expect(page.locator(".dkv-tour")).to_have_count(0)
    button = page.locator("#dkv-model [data-tour=start]")
    button.click()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert serious(page, ".dkv-tour") == []
    page.keyboard.press("Escape")
    expect(page.locator(".dkv-tour")).to_have_count(0)
    expect(button).to_be_focused()
    page.reload()
    expect(button).to_have_text("Continue the tour (4 of 13)")
    expect(page.locator(".dkv-tour")).to_have_count(0)
    button.click()
    expect(page.locator(".dkv-tour-place")).to_have_text("4 of 13")
    page.get_by_role("button", name="Skip").click()
    expect(page.locator(".dkv-tour")).to_have_count(0)


def test_the_tour_opens_by_itself_every_time(page: Page, page_url: str) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{page_url}?tour=1")
    expect(page.locator(".dkv-tour")).to_be_in_viewport(ratio=1)
    page.keyboard.press("Escape")
    page.reload()
    expect(page.locator(".dkv-card")).to_have_count(2)
    # A lecturer who has rehearsed it sees it again.
    expect(page.locator(".dkv-tour")).to_be_in_viewport(ratio=1)
    expect(page.locator(".dkv-tour-place")).to_contain_text("1 of ")
    page.locator(".dkv-answer").first.focus()
    page.keyboard.press("Escape")
    expect(page.locator(".dkv-tour")).to_have_count(0)
    page.locator("#dkv-model [data-tour=start]").click()
    expect(page.locator(".dkv-tour")).to_have_count(1)
    page.get_by_role("tab", name="Lab").click()
    expect(page.locator(".dkv-tour")).to_have_count(0)
