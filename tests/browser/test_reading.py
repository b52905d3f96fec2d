"""Reading one run closely: units, heads, differences, search, gaps, evidence, links, files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from app.examples import Example
from app.record.words import document_of
from dynamickv.record.trace import Trace
from tests.browser.conftest import HOSTILE, open_page, pick
from tests.browser.test_recorded import highlights, point_at_text

pytestmark = pytest.mark.browser
MARKED = """(names) => { let units = 0;
for (const [name, h] of CSS.highlights) if (names.includes(name))
  for (const range of h) units += range.endOffset - range.startOffset;
return units; }"""
KEPT = [f"dkv-kept-{shade}" for shade in range(1, 6)]
DIFFERENCE = ["dkv-both", "dkv-only-a", "dkv-only-b"]


def record(recorded: dict[str, Example], name: str) -> Trace:
    trace = recorded[name].trace
    assert trace is not None
    return trace


def units_of(trace: Trace, chosen: Any) -> int:
    """UTF-16 units of the tokens that a mask chooses."""
    offsets = trace.prompt.text_utf16_offsets
    return sum(end - start for (start, end), yes in zip(offsets, chosen, strict=True) if yes)


def choose(page: Page, role: str, label: str) -> None:
    """Some of them are in the View menu."""
    menu = page.locator(".dkv-document [data-role=menu]")
    menu.evaluate("menu => { menu.open = true }")
    page.locator(f".dkv-document [data-role={role}]").select_option(label=label)
    menu.evaluate("menu => { menu.open = false }")


def test_one_head_shows_exactly_what_it_keeps(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    trace = record(recorded, "ordinary")
    open_page(page, page_url)
    page.evaluate("window.DynamicKV.setLayer(12)")
    choose(page, "head", "2")
    kept = trace.run("DynamicKV").retained.unpack(30, trace.prompt.length)[12, 2]
    assert page.evaluate(MARKED, KEPT) == units_of(trace, kept)
    expect(page.locator(".dkv-legend")).to_contain_text("head 2")


def test_the_difference_of_two_methods_is_exact_at_a_layer(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    trace = record(recorded, "three")
    open_page(page, page_url)
    pick(page, "Three")
    expect(page.locator(".dkv-card")).to_have_count(3)
    page.evaluate("window.DynamicKV.setLayer(7)")
    choose(page, "against", "SnapKV")
    first, second = (
        trace.run(name).retained.unpack(30, trace.prompt.length)[7].any(axis=0)
        for name in ("DynamicKV", "SnapKV")
    )
    shown = [page.evaluate(MARKED, [name]) for name in DIFFERENCE]
    assert shown == [
        units_of(trace, mask) for mask in (first & second, first & ~second, second & ~first)
    ]
    assert shown[1] > 0
    assert page.evaluate(MARKED, KEPT) == 0
    expect(page.locator("[data-role=versus]")).to_contain_text("answer the same, token by token")
    expect(page.locator(".dkv-legend")).to_contain_text("only SnapKV")


PART = """() => {
  const [, a, b] = window.DynamicKV.store.trace.runs;
  b.token_ids = [...a.token_ids];
  b.token_ids[2] += 1;
  b.pieces = [...a.pieces];
  b.pieces[2] = '<b>x</b>';
  b.logprobs = a.logprobs.map(() => Math.log(0.625));
  window.DynamicKV.setView({ run: 2, against: 1 });
  return a.pieces[2]; }"""


def test_two_compared_methods_say_where_their_answers_part(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Three")
    expect(page.locator(".dkv-card")).to_have_count(3)
    theirs = page.evaluate(PART)
    box = page.locator("[data-role=versus] .dkv-parting")
    expect(box).to_contain_text("DynamicKV and SnapKV part at token 3")
    expect(box).to_contain_text("<b>x</b> (63 % with its own cache)")
    expect(box.locator(".dkv-theirs")).to_have_text(theirs)
    choose(page, "against", "FullKV")
    expect(box).to_have_count(0)


def test_the_chart_s_keys_switch_runs_off_and_the_others_take_their_room(
    page: Page, page_url: str
) -> None:
    open_page(page, page_url)
    pick(page, "Three")
    expect(page.locator(".dkv-card")).to_have_count(3)
    bars = """() => document.querySelector('.dkv-plot').data
      .map((t) => [t.meta, t.visible !== false, t.width])"""
    page.wait_for_function(f"({bars})().length === 6")
    before = page.evaluate(bars)
    key = page.locator(".dkv-keys button[data-method=FullKV]")
    key.click()
    expect(page.locator(".dkv-keys button[data-method=FullKV]")).to_have_attribute(
        "aria-pressed", "false"
    )
    page.wait_for_function(f"({bars})().filter((t) => t[1]).length === 4")
    after = page.evaluate(bars)
    assert [shown for name, shown, _ in after if name == "FullKV"] == [False, False]
    assert after[-1][2] == pytest.approx(1.5 * before[-1][2])


def test_words_sentences_and_paragraphs_are_marked_whole(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.evaluate("window.DynamicKV.setLayer(12)")
    sizes = []
    for unit in ("token", "word", "sentence", "paragraph"):
        choose(page, "unit", unit)
        sizes.append(page.evaluate(MARKED, KEPT))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    expect(page.locator(".dkv-legend")).to_contain_text("of the paragraph is kept")


def test_underline_and_shades_change_the_look_and_the_legend(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    choose(page, "mark", "underline")
    expect(page.locator(".dkv-document-view, #dkv-document-view").first).to_be_visible()
    assert page.locator(".dkv-underlined").count() == 1
    choose(page, "shades", "soft")
    assert page.locator(".dkv-legend .dkv-level-5").count() == 0
    assert highlights(page)["dkv-kept-5"] == 0


def test_find_counts_jumps_and_takes_any_text_literally(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.locator(".dkv-scroll").focus()
    page.keyboard.press("/")
    box = page.locator(".dkv-document [data-role=find]")
    expect(box).to_be_focused()
    box.fill("BRIDGE")
    found = page.locator(".dkv-document [data-role=found]")
    expect(found).to_contain_text("1 of ")
    box.press("Enter")
    expect(found).to_contain_text("2 of ")
    box.fill("([a-z]+")
    expect(found).to_have_text("not in the text")
    box.press("Escape")
    expect(box).to_have_value("")
    assert highlights(page)["dkv-find"] == 0


def test_gaps_are_stretches_that_nothing_keeps(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    trace = record(recorded, "ordinary")
    open_page(page, page_url)
    page.evaluate("window.DynamicKV.setLayer(29)")
    page.get_by_label("Next passage").click()
    label = page.locator(".dkv-document [data-role=gap]")
    expect(label).to_contain_text("1 of ")
    first, last = trace.prompt.document_span
    kept = trace.run("DynamicKV").retained.unpack(30, trace.prompt.length)[29].any(axis=0)
    runs = "".join(" x"[int(k)] for k in kept[first:last]).split("x")
    expected = [len(run) for run in runs if len(run) >= 12]
    expect(label).to_have_text(f"1 of {len(expected)}: {expected[0]} tokens")
    page.get_by_label("Previous passage").click()
    expect(label).to_contain_text(f"{len(expected)} of {len(expected)}")


def test_the_minimap_scrolls_the_text(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    strip = page.locator(".dkv-minimap")
    strip.scroll_into_view_if_needed()
    inked = "[...document.querySelector('.dkv-minimap canvas').getContext('2d')" + (
        ".getImageData(0, 0, 30, 200).data].filter((v, i) => i % 4 === 3 && v > 0).length"
    )
    page.wait_for_function(f"{inked} > 50")
    box = strip.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 10, box["y"] + box["height"] - 5)
    page.wait_for_function("document.querySelector('.dkv-scroll').scrollTop > 300")


def test_a_click_says_why_layer_by_layer(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    trace = record(recorded, "scored")
    run = trace.run("DynamicKV")
    assert run.scores is not None
    open_page(page, page_url)
    pick(page, "Scored")
    page.wait_for_function("window.DynamicKV.store.trace.runs[1].scored")
    page.evaluate("window.DynamicKV.setPin({first: 100, last: 100})")
    rows = page.locator(".dkv-evidence tbody tr")
    expect(rows).to_have_count(30)
    expect(rows.first.locator(".dkv-reason")).to_have_count(3)
    scores = run.scores.unpack(30, trace.prompt.length).astype(int)
    prefix = trace.prompt.length - 16
    ranks = [int((row[:prefix] > row[100]).sum()) + 1 for row in scores]
    texts = page.locator(".dkv-evidence .dkv-reason").all_inner_texts()
    shown = [[int(text.replace(",", "")) for text in texts[i::3]] for i in range(3)]
    assert shown == [scores[:, 100].tolist(), ranks, [kept - 16 for kept in run.budgets]]
    # Scores have 256 steps: a token is within the cut for sure only with all that share its score.
    lasts = [int((row[:prefix] >= row[100]).sum()) for row in scores]
    cuts = [kept - 16 for kept in run.budgets]
    sure = sum(last <= cut for last, cut in zip(lasts, cuts, strict=True))
    tied = sum(r <= c for r, c in zip(ranks, cuts, strict=True)) - sure
    assert page.locator(".dkv-evidence .dkv-in").count() == sure
    assert page.locator(".dkv-evidence .dkv-tied").count() == tied
    heads = run.retained.unpack(30, trace.prompt.length)[:, :, 100].sum(axis=1)
    cells = page.locator(".dkv-evidence tbody tr > td:nth-child(3)")  # after the layer and FullKV
    assert [int(text) for text in cells.all_inner_texts()] == heads.tolist()
    cells.nth(4).click()
    expect(page.locator(".dkv-controls [data-role=where]").first).to_contain_text("layer 4")
    page.locator(".dkv-scroll").focus()
    page.keyboard.press("Escape")
    expect(page.locator(".dkv-evidence")).to_be_hidden()


def test_a_click_in_the_text_pins_and_a_selection_shows_survival(
    page: Page, page_url: str, recorded: dict[str, Example]
) -> None:
    open_page(page, page_url)
    point_at_text(page, 40, 12)
    page.mouse.down()
    page.mouse.up()
    expect(page.locator(".dkv-evidence [data-role=note]")).to_contain_text("heads that keep it")
    point_at_text(page, 10, 12)
    page.mouse.down()
    box = page.locator(".dkv-text[data-role=text]").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 180, box["y"] + 34, steps=4)
    page.mouse.up()
    expect(page.locator(".dkv-evidence [data-role=note]")).to_contain_text("per cent of it kept")
    pin = page.evaluate("window.DynamicKV.store.pin")
    run = record(recorded, "ordinary").run("DynamicKV")
    kept = run.retained.unpack(30, 878)
    part = kept[:, :, pin["first"] : pin["last"] + 1]
    sums = page.locator(".dkv-evidence .dkv-sums")
    expect(sums.nth(1).locator("td").nth(1)).to_have_text(f"{int(part.any(axis=(1, 2)).sum())}/30")
    assert run.aligned is not None
    surviving = f"{100 * run.aligned.surviving:.0f}"
    expect(sums.nth(0).locator("td").nth(1)).to_contain_text(surviving)


def test_pointing_at_one_view_marks_the_others(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    point_at_text(page)
    expect(page.locator(".dkv-map-cursor")).to_be_visible()
    page.wait_for_function("document.querySelectorAll('.dkv-marks .dkv-keeps').length > 0")
    canvas = page.locator(".dkv-map canvas")
    canvas.scroll_into_view_if_needed()
    canvas.hover(position={"x": 300, "y": 63})
    expect(page.locator(".dkv-marks i.dkv-on")).to_have_count(1)
    assert highlights(page)["dkv-hover"] == 1
    bar = page.locator(".js-plotly-plot .bars path").nth(100)
    bar.scroll_into_view_if_needed()
    bar.hover(force=True)
    expect(page.locator(".dkv-map-row")).to_be_visible()
    expect(page.locator(".dkv-document [data-role=where]")).to_contain_text("layer ")
    page.get_by_role("button", name="Along the document").click()
    point = page.locator(".js-plotly-plot .scatterlayer .points path").nth(3)
    point.hover(force=True)
    page.wait_for_function("CSS.highlights.get('dkv-hover').size > 0")


def test_the_address_keeps_what_is_looked_at(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Three")
    expect(page.locator(".dkv-card")).to_have_count(3)
    page.evaluate("window.DynamicKV.setLayer(17)")
    choose(page, "against", "SnapKV")
    choose(page, "head", "1")
    page.get_by_label("number input for Capacity").fill("64")
    page.wait_for_url("**/?ex=three&m=dynamickv,snapkv&b=64&layer=17&head=1")
    page.reload()
    where = page.locator(".dkv-document [data-role=where]")
    expect(where).to_contain_text("layer 17")
    expect(page.locator(".dkv-card")).to_have_count(3)
    expect(page.locator(".dkv-document [data-role=head]")).to_have_value("1")
    expect(page.locator(".dkv-legend")).to_contain_text("only SnapKV")
    expect(page.locator("#dkv-example input")).to_have_value("Three")
    expect(page.get_by_label("number input for Capacity")).to_have_value("64")
    said = "The link asks for capacity 64; the run shown was recorded at 96."
    expect(page.locator("#dkv-status")).to_contain_text(said)
    page.locator("[data-role=link]").click()
    expect(page.locator("[data-role=link]")).to_have_text("Link copied.")
    assert page.evaluate("navigator.clipboard.readText()") == page.url


@pytest.mark.parametrize(
    "query",
    [
        "?ex=%3Cscript%3E&m=%22onload&layer=-1&head=9999&by=constructor&mark=__proto__",
        "?ex=ordinary&m=nobody,fullkv&layer=99999&shades=%00",
        "?layer=1e9&ex=",
    ],
)
def test_a_hostile_address_changes_nothing(page: Page, page_url: str, query: str) -> None:
    open_page(page, page_url, query)
    expect(page.locator(".dkv-document [data-role=where]")).to_have_text("all 30 layers")
    expect(page.locator(".dkv-document [data-role=unit]")).to_have_value("token")


def test_a_text_that_is_not_there_yet_is_not_marked(page: Page, page_url: str) -> None:
    """A view may be told of a run before it has laid its text out."""
    open_page(page, page_url)
    page.evaluate(
        """() => { const boxes = [1, 2, 3].map(() => document.createElement("p"));
        const text = DynamicKV.textLayer(boxes);
        text.markTokens("dkv-probe", 0, 1, 1); text.paint([1], ["dkv-probe"]); }"""
    )


def test_an_embedded_run_stands_alone(page: Page, page_url: str) -> None:
    open_page(page, page_url, "?embed=1")
    assert page.locator("#dkv-inputs").is_hidden()
    assert page.locator("#dkv-model").is_hidden()
    height = page.locator(".dkv-answer").first.evaluate("n => n.getBoundingClientRect().height")
    assert height == pytest.approx(66, abs=3)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_going_back_restores_the_view(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.evaluate("window.DynamicKV.setLayer(9)")
    page.wait_for_url("**layer=9**")
    page.goto(page_url + "?ex=three&layer=4")
    where = page.locator(".dkv-document [data-role=where]")
    expect(where).to_contain_text("layer 4")
    page.go_back()
    expect(where).to_contain_text("layer 9")


def test_an_iframe_has_one_scrollbar(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.set_viewport_size({"width": 900, "height": 800})
    page.evaluate(
        """(url) => { const frame = document.createElement('iframe');
        Object.assign(frame, { src: url, width: 800, height: 700 });
        frame.style.border = 0; document.body.replaceChildren(frame); }""",
        page_url + "?embed=1",
    )
    frame = page.frames[-1]
    frame.wait_for_selector(".dkv-card")
    frame.wait_for_selector(".js-plotly-plot .bars path", state="attached")
    tall = frame.evaluate(
        """() => [...document.querySelectorAll('*')].filter((node) =>
        /auto|scroll/.test(getComputedStyle(node).overflowY) && node.clientHeight > 300
        && node.scrollHeight > node.clientHeight + 2
        && !node.matches('html, body, .dkv-scroll')).length"""
    )
    assert tall == 0
    assert frame.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_a_text_of_ones_own_is_no_example(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    expect(page.locator("#dkv-example input")).to_have_value("Ordinary")
    page.locator("#dkv-document textarea").fill("A text of my own.")
    expect(page.locator("#dkv-example input")).to_have_value("Your own text")


def test_an_example_ticks_the_methods_it_shows(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Three")
    expect(page.get_by_label("SnapKV", exact=True).first).to_be_checked()
    pick(page, "Ordinary")
    expect(page.get_by_label("SnapKV", exact=True).first).not_to_be_checked()


def test_own_text_begins_with_an_empty_form(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    pick(page, "Your own text")
    expect(page.locator("#dkv-status")).to_contain_text("Paste or upload your text.")
    expect(page.locator("#dkv-document textarea")).to_have_value("")
    expect(page.locator("#dkv-question textarea")).to_have_value("")
    pick(page, "Three")
    expect(page.locator("#dkv-document textarea")).not_to_have_value("")


def download(page: Page, selector: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(selector).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_run_saved_without_its_text_keeps_every_number(
    page: Page, page_url: str, recorded: dict[str, Example], tmp_path: Path
) -> None:
    trace = record(recorded, "ordinary")
    open_page(page, page_url)
    page.get_by_role("tab", name="Runs & API").click()
    bare = Trace.load(download(page, "#dkv-save-bare", tmp_path))
    text = json.dumps(bare.to_dict(), ensure_ascii=False)
    assert "river" not in text
    assert "northern" not in text
    held, whole = bare.runs[1].aligned, trace.runs[1].aligned
    assert held is not None
    assert whole is not None
    assert held.instead == ["", " ···", "", "", "", ""]
    assert held.probabilities == whole.probabilities
    assert bare.prompt.text_utf16_offsets == trace.prompt.text_utf16_offsets
    assert [run.retained for run in bare.runs] == [run.retained for run in trace.runs]
    assert [run.kv_bytes for run in bare.runs] == [run.kv_bytes for run in trace.runs]


@pytest.mark.parametrize("name", ["hostile", "scored"])
def test_one_html_file_shows_the_run_offline(
    page: Page,
    page_url: str,
    recorded: dict[str, Example],
    tmp_path: Path,
    context_offline: BrowserContext,
    name: str,
) -> None:
    open_page(page, page_url)
    if name != "ordinary":
        pick(page, name.capitalize())
        page.wait_for_url(f"**ex={name}**")
    page.get_by_role("tab", name="Runs & API").click()
    file = download(page, "#dkv-save-page", tmp_path)
    assert file.suffix == ".html"
    assert file.stat().st_size < 8 * 2**20
    offline = context_offline.new_page()
    problems: list[str] = []
    offline.on("pageerror", lambda error: problems.append(str(error)))
    offline.on(
        "console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None
    )
    offline.on("request", lambda r: problems.append(r.url) if "file:" not in r.url else None)
    offline.goto(file.as_uri())
    expect(offline.locator(".dkv-card")).to_have_count(2)
    expect(offline.locator(".js-plotly-plot .bars path").first).to_be_attached()
    shown = offline.evaluate("document.querySelector('.dkv-text[data-role=text]').textContent")
    assert shown == document_of(record(recorded, name).prompt)
    assert offline.evaluate("window.pwned") is None
    offline.evaluate("window.DynamicKV.setLayer(3)")
    expect(offline.locator(".dkv-document [data-role=where]")).to_contain_text("layer 3")
    offline.evaluate("window.DynamicKV.setPin({first: 50, last: 50})")
    expect(offline.locator(".dkv-evidence tbody tr")).to_have_count(30)
    expect(offline.locator(".dkv-evidence .dkv-reason")).to_have_count(
        90 if name == "scored" else 0
    )
    # Nothing there that only a server could do.
    expect(offline.get_by_role("button", name="Always keep")).to_be_hidden()
    assert [p for p in problems if "blob:" not in p] == []


def test_a_run_file_fills_the_form(
    page: Page, page_url: str, recorded: dict[str, Example], tmp_path: Path
) -> None:
    trace = record(recorded, "hostile")
    trace.save(tmp_path / "run.json.gz")
    open_page(page, page_url)
    page.get_by_role("tab", name="Runs & API").click()
    page.locator("input[type=file][accept*='.json']").first.set_input_files(
        tmp_path / "run.json.gz"
    )
    expect(page.locator("#dkv-open-note")).to_contain_text("Opened.")
    page.get_by_role("tab", name="Explore").click()
    assert page.locator("#dkv-document textarea").input_value() == HOSTILE
    expect(page.locator("#dkv-capacity input[type=number]")).to_have_value("40")
    expect(page.locator("#dkv-example input")).to_have_value("Your own text")
    assert page.get_by_label("DynamicKV", exact=True).first.is_checked()
    assert not page.get_by_label("SnapKV", exact=True).first.is_checked()
    assert page.locator("#dkv-question textarea").input_value() == trace.prompt.question


EVIL = "<img src=x onerror=window.pwned=1>"


def test_a_record_with_hostile_names_is_only_words(
    page: Page, page_url: str, recorded: dict[str, Example], tmp_path: Path
) -> None:
    data = record(recorded, "three").to_dict()
    data["model"]["name"] = f"../../{EVIL}${{window.pwned=2}}"
    data["created"] = f"2026-11-23{EVIL}"
    data["runs"][1]["method"] = EVIL
    again = json.loads(json.dumps(data["runs"][2]))
    again["parameters"] |= {"pooling": EVIL * 9, "pinned": [[0, 10**9], [3, 1], "x", [1, 4]]}
    data["runs"].append(again)
    (tmp_path / "run.json").write_text(json.dumps(data))
    open_page(page, page_url)
    page.get_by_role("tab", name="Runs & API").click()
    page.locator("input[type=file][accept*='.json']").first.set_input_files(tmp_path / "run.json")
    expect(page.locator("#dkv-open-note")).to_contain_text("Opened.")
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator(".dkv-card h3").filter(has_text="img src")).to_have_text(EVIL)
    page.get_by_role("button", name="Along the document").click()
    expect(page.locator(".js-plotly-plot .scatterlayer path").first).to_be_attached()
    with page.expect_download() as waiting:
        page.locator(".dkv-figures [data-role=save]").select_option("svg")
    assert set(waiting.value.suggested_filename) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
    )
    waiting.value.save_as(tmp_path / "chart.svg")
    assert "<img" not in (tmp_path / "chart.svg").read_text()
    page.evaluate("window.DynamicKV.setPin({first: 2, last: 2})")
    expect(page.locator(".dkv-evidence [data-role=note]")).to_contain_text("pinned by hand")
    assert page.locator(".dkv-panel img, .dkv-answers img").count() == 0
    assert page.evaluate("window.pwned") is None


BROKEN: dict[str, bytes] = {
    "truncated": b"\x1f\x8b\x08\0\0\0\0\0",
    "deep": b"[" * 100_000,
    "script": b"<script>window.pwned = 1</script>",
    "bomb": __import__("gzip").compress(b"0" * (65 * 2**20)),
}


def test_a_broken_run_file_is_one_sentence_and_loses_nothing(page: Page, page_url: str) -> None:
    open_page(page, page_url)
    page.get_by_role("tab", name="Runs & API").click()
    note = page.locator("#dkv-open-note")
    for name, content in BROKEN.items():
        page.locator("input[type=file][accept*='.json']").first.set_input_files(
            {"name": f"{name}.json.gz", "mimeType": "application/gzip", "buffer": content}
        )
        expect(note).to_contain_text(re.compile(f"Not opened.*{name}", re.DOTALL))
        assert len(note.inner_text()) < 300
    assert page.evaluate("window.pwned") is None
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator("[data-role=source]")).to_contain_text("recorded on 23 November 2026")
    expect(page.locator("#dkv-example input")).to_have_value("Ordinary")
