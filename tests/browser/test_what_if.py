"""What-if on the page, with a tiny model: read, predict, draw, answer."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page, expect

import dynamickv as dkv
from app.serving.model_host import ModelHost
from app.serving.shelf import Shelf
from dynamickv.reading.prompt import encode_text
from tests.app.synthetic import synthetic_trace
from tests.browser.conftest import example, no_model, open_page, serious_findings, serve
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

pytestmark = pytest.mark.browser
LENGTH = "window.DynamicKV.store.trace.prompt.length"
PREDICTED = "window.DynamicKV.store.trace.runs.at(-1)"


@pytest.fixture(scope="module")
def tiny_url(recorded: dict) -> Iterator[str]:  # type: ignore[type-arg]
    """A page whose model is tiny and answers nonsense at once."""
    llm = tiny_llm()
    yield from serve(ModelHost("tiny", loader=lambda name: llm), {"ordinary": recorded["ordinary"]})


def unfold(page: Page) -> None:
    """On a narrow screen the form is folded."""
    fold = page.get_by_role("button", name="Text, question and settings")
    if fold.is_visible():
        fold.click()


def run(page: Page, url: str, method: str = "DynamicKV") -> None:
    """A comparison of 64 tokens per layer."""
    open_page(page, url)
    unfold(page)
    if method != "DynamicKV":
        page.get_by_label("DynamicKV", exact=True).first.uncheck()
        page.get_by_label(re.compile(rf"{method}\b")).first.check()
    page.locator("#dkv-document textarea").fill(DOCUMENT)
    page.locator("#dkv-question textarea").fill(QUESTION)
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="tiny").click()
    page.locator("#dkv-advanced > button").click()
    length = page.get_by_label("number input for Longest answer, in tokens")
    length.fill("6")
    length.blur()
    capacity = page.locator("#dkv-capacity input[type=number]")
    capacity.fill("64")
    capacity.blur()
    page.locator("#dkv-run").click()
    expect(page.locator("#dkv-status")).to_contain_text("Done.", timeout=60_000)
    expect(page.locator(".dkv-what-if [data-role=words]")).to_contain_text("Move anything")


def outlined(page: Page) -> list[int]:
    """Tokens per layer that the boxes over the budget chart stand for."""
    tokens = """() => { const { xaxis } = document.querySelector('.dkv-plot')._fullLayout;
        return [...document.querySelectorAll('.dkv-outlines:not([hidden]) i')]
          .map((box) => Math.round(xaxis.p2d(xaxis.d2p(0) + parseFloat(box.style.width)))); }"""
    page.wait_for_function("document.querySelector('.dkv-outlines:not([hidden]) i')")
    found: list[int] = page.evaluate(tokens)
    return found


def test_a_slider_predicts_and_the_answer_keeps_exactly_that(page: Page, tiny_url: str) -> None:
    run(page, tiny_url)
    page.locator("[data-setting=capacity]").fill("40")
    expect(page.locator(".dkv-what-if .dkv-chip")).to_have_text("predicted, not run")
    page.wait_for_function(f"{PREDICTED}.predicted && {PREDICTED}.parameters.capacity === 40")
    expect(page.locator(".dkv-document .dkv-tabs [aria-pressed=true]")).to_contain_text("what if")
    assert outlined(page) == page.evaluate(f"{PREDICTED}.budgets")
    predicted = page.evaluate(f"{PREDICTED}.retained.bits")
    page.get_by_role("button", name="Answer with this").click()
    card = page.locator(".dkv-card").nth(2)
    expect(card.locator("h3")).to_have_text("DynamicKV, capacity 40")
    expect(page.locator("#dkv-status")).to_contain_text("Done.")
    page.wait_for_function(f"{PREDICTED} && !{PREDICTED}.predicted")
    assert page.evaluate(f"{PREDICTED}.retained.bits") == predicted
    expect(page.locator(".dkv-parting").first).to_contain_text("with the full cache")
    expect(page.locator(".dkv-what-if .dkv-chip")).to_have_text("")


def test_a_passage_is_dropped_and_pinned_by_hand_and_answered_with(
    page: Page, tiny_url: str
) -> None:
    run(page, tiny_url)
    expect(page.get_by_role("button", name="Always keep")).to_be_hidden()
    page.evaluate("window.DynamicKV.setPin({first: 40, last: 45})")
    page.get_by_role("button", name="Always keep").click()
    page.wait_for_function(f"{PREDICTED}.predicted")
    page.evaluate("window.DynamicKV.setPin({first: 43, last: 50})")
    page.get_by_role("button", name="Always drop").click()
    page.wait_for_function(f"{PREDICTED}.parameters.evicted")
    assert page.evaluate(f"[{PREDICTED}.parameters.pinned, {PREDICTED}.parameters.evicted]") == [
        [[40, 43]],
        [[43, 51]],
    ]
    expect(page.locator(".dkv-marked-chip")).to_have_count(2)
    counts = f"Array.from({PREDICTED}.kept.subarray(2 * {LENGTH} + 40, 2 * {LENGTH} + 51))"
    kept = page.evaluate(counts)
    assert min(kept[:3]) == 2
    assert max(kept[3:]) == 0
    expect(page.locator(".dkv-legend")).to_contain_text("pinned by hand")
    assert page.evaluate("CSS.highlights.get('dkv-evicted').size") > 0
    page.evaluate("window.DynamicKV.setPin({first: 60, last: 64})")
    assert serious_findings(page) == []
    bits = page.evaluate(f"{PREDICTED}.retained.bits")
    page.locator(".dkv-evidence").get_by_role("button", name="Answer with this").click()
    label = "DynamicKV, 3 tokens pinned, 8 evicted"
    expect(page.locator(f".dkv-card[data-label='{label}']")).to_have_count(1)
    page.wait_for_function(f"!{PREDICTED}.predicted && {PREDICTED}.parameters.pinned")
    assert page.evaluate(f"{PREDICTED}.retained.bits") == bits
    page.evaluate("window.DynamicKV.setPin({first: 44, last: 44})")
    note = page.locator(".dkv-evidence [data-role=note]")
    expect(note).to_contain_text(f"evicted by hand in {label}")
    page.locator(".dkv-evidence [data-role=close]").click()
    page.get_by_label("No longer evicted").click()
    page.wait_for_function(f"{PREDICTED}.predicted && !{PREDICTED}.parameters.evicted")
    page.get_by_role("button", name="Take back").click()
    expect(page.locator(".dkv-marked-chip")).to_have_count(0)


def test_settings_that_a_method_ignores_are_not_offered_or_inherited(
    page: Page, tiny_url: str
) -> None:
    run(page, tiny_url, "H2O")
    expect(page.locator("[data-setting=method]")).to_have_value("H2O")
    assert page.locator("[data-setting=kernel_size]").count() == 0
    page.locator("[data-setting=method]").select_option("SnapKV")
    page.wait_for_function(f"{PREDICTED}.predicted && {PREDICTED}.method === 'SnapKV'")
    assert page.evaluate(f"{PREDICTED}.parameters.kernel_size") == 7


def test_on_a_phone_a_run_is_watched_and_nothing_moves(page: Page, tiny_url: str) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    run(page, tiny_url)
    page.evaluate("window.scrollTo(0, 0)")
    tops = """() => { document.body.style.setProperty('--dkv-action',
        document.querySelector('#dkv-action').offsetHeight + 'px');
      const top = () => document.querySelector('.dkv-answers').getBoundingClientRect().top;
      const before = top();
      document.body.classList.add('dkv-running');
      const during = top();
      document.body.classList.remove('dkv-running');
      return during - before; }"""
    assert abs(page.evaluate(tops)) < 24
    page.locator("#dkv-run").click()
    expect(page.locator("#dkv-status")).to_contain_text("Done.", timeout=60_000)
    expect(page.locator(".dkv-answers h2")).to_be_in_viewport()


ROUNDS = 4
"""Tries that a time has where other work on the machine may outlast one."""
SLIDE = """async (capacities) => {
  const slider = document.querySelector('[data-setting=capacity]');
  const times = [];
  for (const capacity of capacities) {
    const painted = new Promise((done) => addEventListener('dkv:runs',
      () => requestAnimationFrame(() => requestAnimationFrame(done)), { once: true }));
    const start = performance.now();
    slider.value = capacity;
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    await painted;
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b)[2]; // the server shares its machine with other tests
}"""


@pytest.mark.timed
def test_a_slider_is_answered_at_once(page: Page, tiny_url: str) -> None:
    run(page, tiny_url)
    assert page.evaluate(SLIDE, [24, 32, 40, 48, 56, 48, 40, 32, 24]) < 2 * 100


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A page without a model, and the key of an invented prompt of 8K tokens and 30 layers on its
    shelf."""
    trace = synthetic_trace(tokens=11_400, capacity=128, window=8)
    length, model = trace.prompt.length, trace.model
    assert (length > 8192, model.num_layers) == (True, 30)
    torch.manual_seed(0)
    layers = tuple(
        dkv.LayerObservation(
            queries=torch.randn(model.num_query_heads, 64, model.head_dim),
            keys=torch.randn(model.num_kv_heads, length, model.head_dim),
            scaling=model.head_dim**-0.5,
            values=torch.randn(model.num_kv_heads, length, model.head_dim),
            mass=torch.rand(model.num_query_heads, length),
        )
        for _ in range(model.num_layers)
    )
    prompt = encode_text(tiny_llm().tokenizer, "invented")
    prefill = dkv.Prefill(
        prompt=prompt,
        layers=layers,
        values=(torch.zeros_like(layers[0].keys),) * model.num_layers,
        logits=torch.zeros(1),
        took=lambda: 1.0,
    )
    shelf = Shelf()
    key = shelf.put(trace, "run", "tiny", prefill)
    shown = {"long": example("long", trace, tmp_path_factory.mktemp("long"))}
    for url in serve(ModelHost(loader=no_model), shown, shelf):  # type: ignore[arg-type]
        yield url, key


@pytest.mark.timed
def test_8k_tokens_of_30_layers_are_chosen_again_at_once_by_every_method(
    page: Page, long_page: tuple[str, str]
) -> None:
    url, key = long_page
    open_page(page, url)
    show = "(key) => DynamicKV.setTrace({ ...DynamicKV.store.payload, key, ready: true })"
    page.evaluate(show, key)
    picker = page.locator("[data-setting=method]")
    methods = picker.locator("option").all_inner_texts()
    assert set(methods) == set(dkv.METHODS) - {"FullKV", "Manual"}
    times = {}
    for method in methods:
        picker.select_option(method)
        page.wait_for_function(f"{PREDICTED}.method === '{method}'")
        page.wait_for_timeout(100)  # the first choice with other attentions has been painted
        for tried in range(ROUNDS):
            page.wait_for_timeout(500 * tried)  # what else the machine does passes
            times[method] = page.evaluate(SLIDE, [64, 256, 1024, 512, 128, 64])
            if times[method] < 2 * limit_of(method):
                break
    assert all(times[method] < 2 * limit_of(method) for method in methods), times


def limit_of(method: str) -> int:
    """Milliseconds; the rivals that score more than attention are not held to the page's 100."""
    return 300 if method in ("CAKE", "LAVa", "KeyDiff") else 100


def test_take_back_leaves_the_run_as_it_was(page: Page, tiny_url: str) -> None:
    run(page, tiny_url)
    page.locator("[data-setting=window_size]").fill("20")
    expect(page.get_by_role("button", name="Take back")).to_be_visible()
    page.wait_for_function(f"{PREDICTED}.predicted")
    page.get_by_role("button", name="Take back").click()
    expect(page.locator(".dkv-document .dkv-tabs button")).to_have_count(2)
    expect(page.locator(".dkv-what-if .dkv-chip")).to_have_text("")


def test_a_setting_that_cannot_be_says_so_in_one_sentence(page: Page, tiny_url: str) -> None:
    run(page, tiny_url)
    page.locator("[data-setting=method]").select_option("H2O")
    expect(page.locator(".dkv-wrong")).to_contain_text("tick H2O and press Run once")


def test_dragging_a_bar_keeps_the_total(page: Page, tiny_url: str) -> None:
    run(page, tiny_url)
    page.get_by_role("button", name="Draw your own budgets").click()
    page.get_by_role("button", name="pyramid").click()
    # Drawing begins with the run's budgets; the pyramid comes after them.
    falls = f"{PREDICTED}.budgets.every((budget, i, all) => !i || budget <= all[i - 1])"
    page.wait_for_function(f"{PREDICTED}.predicted && {PREDICTED}.method === 'Manual' && {falls}")
    assert sum(outlined(page)) == 64 * 6
    plot = page.locator(".dkv-plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    place = page.evaluate(
        """() => { const { xaxis, yaxis } = document.querySelector('.dkv-plot')._fullLayout;
        return [xaxis._offset + xaxis.d2p(20), xaxis._offset + xaxis.d2p(100),
                yaxis._offset + yaxis.d2p(5)]; }"""
    )
    page.mouse.move(box["x"] + place[0], box["y"] + place[2])
    page.mouse.down()
    page.mouse.move(box["x"] + place[1], box["y"] + place[2], steps=5)
    page.mouse.up()
    page.wait_for_function(f"Math.abs({PREDICTED}.budgets[5] - 100) < 4")
    drawn = page.evaluate(f"{PREDICTED}.budgets")
    assert sum(drawn) == 64 * 6
    page.get_by_label("More tokens for the chosen layer").click()
    page.wait_for_function(f"{PREDICTED}.budgets[5] === {drawn[5] + 8}")
    page.get_by_role("button", name="Answer with this").click()
    expect(page.locator(".dkv-card[data-method=Manual]")).to_be_visible()
    expect(page.locator("#dkv-status")).to_contain_text("Done.")
    page.wait_for_function(f"!{PREDICTED}.predicted")
    made = page.evaluate(f"{PREDICTED}.budgets")
    assert sum(made) == 64 * 6
    assert made[5] == drawn[5] + 8


def test_shares_add_up_within_their_bounds(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    for weights, total, least, most in (
        ([1, 1, 1], 100, 8, 500),
        ([5, 0, 0], 100, 8, 60),
        ([0, 0, 0], 31, 8, 500),
        ([1, 2, 3, 4], 4000, 8, 900),
        ([1, 1], 7, 8, 10),
    ):
        shared = page.evaluate(
            "([w, t, l, m]) => window.DynamicKV.share(w, t, l, m)", [weights, total, least, most]
        )
        size = len(weights)
        assert sum(shared) == min(max(total, least * size), most * size)
        assert min(shared) >= least
        assert max(shared) <= most
        heaviest = weights.index(max(weights))
        assert shared[heaviest] == max(shared)


def test_the_client_and_curl_snippets_run(
    page: Page, tiny_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(page, tiny_url)
    page.get_by_role("tab", name="Runs & API").click()
    texts = {}
    for name in ("client", "curl"):
        shown = page.locator(f"#dkv-{name} .cm-content")
        expect(shown).to_contain_text("Who keeps the light?")
        texts[name] = "\n".join(shown.locator(".cm-line").all_inner_texts())
    (tmp_path / "document.txt").write_text(DOCUMENT, encoding="utf-8")
    for name, command in (("client", [sys.executable, "-c"]), ("curl", ["bash", "-c"])):
        done = subprocess.run(
            [*command, texts[name]], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "DynamicKV" in done.stdout


def test_the_mcp_settings_lead_to_the_same_comparison(page: Page, tiny_url: str) -> None:
    """Runs where gradio[mcp] is installed: without it the page has no MCP server."""
    pytest.importorskip("mcp")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    run(page, tiny_url)
    page.get_by_role("tab", name="Runs & API").click()
    shown = page.locator("#dkv-mcp .cm-content")
    expect(shown).to_contain_text("mcpServers")
    settings = json.loads("\n".join(shown.locator(".cm-line").all_inner_texts()))
    asked = {"document": DOCUMENT, "question": QUESTION, "capacity": 40, "max_new_tokens": 2}

    async def call() -> str:
        async with (
            streamablehttp_client(settings["mcpServers"]["dynamickv"]["url"]) as (reads, writes, _),
            ClientSession(reads, writes) as client,
        ):
            await client.initialize()
            tools = {tool.name for tool in (await client.list_tools()).tools}
            assert tools == {"compare", "tokenize", "methods", "models"}
            reply = await client.call_tool("compare", {**asked, "model": "tiny"})
            assert not reply.isError
            return str(reply.content[0].text)

    with ThreadPoolExecutor(1) as thread:  # Playwright has this thread's event loop
        told = thread.submit(asyncio.run, call()).result()
    assert "DynamicKV" in told


def test_two_visitors_share_nothing(page: Page, tiny_url: str) -> None:
    run(page, tiny_url)
    first = page.evaluate("window.DynamicKV.store.trace.key")
    other = page.context.new_page()
    run(other, tiny_url)
    second = other.evaluate("window.DynamicKV.store.trace.key")
    assert first != second
    assert min(len(first), len(second)) >= 32
    page.locator("[data-setting=capacity]").fill("24")
    page.wait_for_function(f"{PREDICTED}.predicted")
    assert other.evaluate(f"{PREDICTED}.predicted") is None
    reply = other.evaluate(
        "window.DynamicKV.store.server.predict({ key: 'x'.repeat(32), method: 'SnapKV' })"
    )
    assert "no longer holds this run" in reply["error"]
