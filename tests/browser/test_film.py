"""The film in a real browser: by itself on a first visit, step by step, and live."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.examples import Example
from app.record.film import film_of
from tests.browser.conftest import open_page

pytestmark = pytest.mark.browser

FIRST_PAINT = 2.5
SLACK = 2
STATE = """() => {
  const { store } = window.DynamicKV;
  const run = store.trace.runs[store.view.run];
  const bars = document.querySelector(".dkv-plot").data ?? [];
  const own = bars.filter((bar) => bar.meta === run.look);
  return {
    step: store.film?.step ?? null,
    budgets: Array.from(run.now?.budgets ?? run.budgets),
    bars: own.length ? own[0].x.map((x, i) => x + own[1].x[i]) : [],
    limit: document.querySelector(".dkv-plot").layout?.xaxis.range[1],
    text: document.querySelector(".dkv-controls [data-role=where]").textContent,
    rows: (() => {
      const canvas = document.querySelector(".dkv-map canvas");
      const { data } = canvas.getContext("2d").getImageData(0, 0, 1, canvas.height);
      return data.filter((value, i) => i % 4 === 3 && value).length;
    })(),
  };
}"""


def state(page: Page) -> dict[str, Any]:
    """What text, budgets and map show now."""
    found: dict[str, Any] = page.evaluate(STATE)
    return found


def moves(page: Page) -> None:
    page.emulate_media(reduced_motion="no-preference")


def test_text_budgets_and_map_show_the_same_moment(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    open_page(page, page_url)
    page.wait_for_function("document.querySelector('.dkv-plot').data?.length > 3")
    trace = recorded["ordinary"].trace
    assert trace is not None
    place = next(i for i, run in enumerate(trace.runs) if run.method == "DynamicKV")
    film = film_of(trace)[place]
    assert film is not None
    limits = set()
    for step in (1, 4, 5, 17, 29):
        page.get_by_label("Layers read", exact=True).fill(str(step))
        expect(page.locator("#dkv-film [data-role=where]")).to_have_text(
            f"{step} of 30 layers read"
        )
        page.wait_for_function(
            "([step, first]) => { const bars = document.querySelector('.dkv-plot').data"
            ".filter((bar) => bar.meta === 'DynamicKV');"
            " return bars[0].x.map((x, i) => x + bars[1].x[i]).filter(Boolean).length === step"
            " && bars[0].x[0] + bars[1].x[0] === first; }",
            arg=[step, film[step - 1][0]],
        )
        shown = state(page)
        assert shown["budgets"] == film[step - 1]
        assert shown["bars"] == film[step - 1] + [0] * (30 - step)
        assert shown["rows"] == step
        assert shown["text"] == f"{step} of 30 layers read"
        limits.add(shown["limit"])
    assert len(limits) == 1


def test_arrow_keys_step_the_film_and_end_it(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    slider = page.get_by_label("Layers read", exact=True)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert state(page)["step"] == 29
    expect(slider).to_have_attribute(
        "aria-valuetext", re.compile("^29 of 30 layers read; DynamicKV")
    )
    page.get_by_label("One layer back").focus()
    page.keyboard.press("ArrowLeft")
    assert state(page)["step"] == 28
    page.keyboard.press("Home")
    assert state(page)["step"] == 0
    page.keyboard.press("End")
    assert state(page)["step"] is None
    assert page.evaluate("window.DynamicKV.store.view.layer") is None


def test_the_film_plays_by_itself_once_and_ends_with_the_answers(page: Page, page_url: str) -> None:
    moves(page)
    open_page(page, page_url)
    page.wait_for_function("window.DynamicKV.store.film?.step > 0")
    expect(page.locator(".dkv-card-map").first).to_be_visible()
    expect(page.locator(".dkv-answer").first).to_be_hidden()
    expect(page.locator(".dkv-answer").first).to_be_visible()
    assert state(page)["step"] is None
    page.goto(page_url)
    page.wait_for_selector(".dkv-card")
    page.wait_for_timeout(800)
    assert state(page)["step"] is None


@pytest.mark.parametrize("by", ["Escape", "button", "click elsewhere"])
def test_the_film_can_be_skipped(page: Page, page_url: str, by: str) -> None:
    moves(page)
    open_page(page, page_url)
    page.wait_for_function("window.DynamicKV.store.film?.step > 0")
    if by == "Escape":
        page.keyboard.press("Escape")
    elif by == "button":
        page.get_by_role("button", name="Skip").click()
    else:
        page.locator(".dkv-answers-head h2").click()
    page.wait_for_function("window.DynamicKV.store.film === null", timeout=1000)
    expect(page.locator(".dkv-answer").first).to_be_visible()


def test_reduced_motion_leaves_the_film_to_its_keys(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.wait_for_timeout(600)
    assert state(page)["step"] is None
    page.get_by_label("Play the film").click()
    assert state(page)["step"] == 0
    page.wait_for_timeout(600)
    assert state(page)["step"] == 0


def test_the_film_pauses(page: Page, page_url: str) -> None:
    moves(page)
    open_page(page, page_url, "?ex=ordinary")
    page.get_by_label("Play the film").click()
    page.wait_for_function("window.DynamicKV.store.film?.step > 2")
    page.get_by_label("Pause the film").click()
    paused = state(page)["step"]
    page.wait_for_timeout(500)
    assert state(page)["step"] == paused


@pytest.mark.timed
def test_the_film_is_painted_soon(page: Page, page_url: str) -> None:
    moves(page)
    page.add_init_script(
        "addEventListener('dkv:film', () => requestAnimationFrame(() => "
        "{ window.firstFilm ??= performance.now(); }));"
    )
    page.goto(page_url)
    page.wait_for_function("window.firstFilm")
    assert page.evaluate("window.firstFilm") / 1000 <= SLACK * FIRST_PAINT


def test_rows_come_while_the_prompt_is_read(page: Page, model_url: str) -> None:
    page.add_init_script(
        "window.steps = []; addEventListener('dkv:film', () => { const { film } = "
        "window.DynamicKV.store; if (film?.live) { window.steps.push(film.step);"
        " if (!document.querySelector('.dkv-live-bars').hidden)"
        " (window.bars ??= []).push(document.querySelector('.dkv-plot').data.length);"
        " for (const { now } of window.DynamicKV.store.trace.runs)"
        " window.holes = (window.holes ?? 0)"
        " + Array.from(now.read.slice(0, film.step)).filter((told) => !told).length; } });"
    )
    open_page(page, model_url)
    run = page.locator("#dkv-run")
    expect(run).to_be_enabled()
    run.click()
    page.wait_for_function("window.DynamicKV.store.film?.live", timeout=60_000)
    expect(page.locator(".dkv-card-map").first).to_be_visible()
    page.wait_for_function(
        "window.DynamicKV.store.trace && !window.DynamicKV.store.trace.live", timeout=120_000
    )
    steps = page.evaluate("window.steps")
    assert steps == sorted(steps)
    assert page.evaluate("window.holes") == 0
    # Plotly, which would hold up the rows, draws the axes alone meanwhile.
    assert set(page.evaluate("window.bars")) == {0}
    assert any(0 < step < 30 for step in steps)
    assert steps[-1] == 30
    expect(page.locator(".dkv-answer").first).to_be_visible()
