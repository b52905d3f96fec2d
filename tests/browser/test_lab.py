"""The Lab in a browser: charts and tables on a phone and in the dark, and a measurement."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from app.examples import Example
from app.lab import layout as lab_layout
from app.lab import view_model as lab_model
from app.serving.model_host import ModelHost
from dynamickv.evaluate.longbench import LongBenchExperiment
from tests.browser.conftest import serve
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

pytestmark = pytest.mark.browser
PARTS = ("Needle", "Sweep", "Tasks", "LongBench")


def lines(field: str, **more: Any) -> list[dict[str, Any]]:
    """Six methods at two capacities with invented scores."""
    return [
        {
            "method": method, "capacity": size, "kept_fraction": 0.1, "kv_bytes": 2**20,
            "interval": [0.2, 0.9], field: 0.5, "over_snapkv": None, **more,
        }
        for method in lab_layout.SIX
        for size in ([None] if method == "FullKV" else [64, 128])
    ]  # fmt: skip


def records() -> dict[str, Any]:
    cells = [
        {"length": n, "depth": d, "exact": 1.0, "fuzzy": 1.0, "samples": 1}
        for n in (1024, 2048, 3072, 4096)
        for d in (0.0, 0.5, 1.0)
    ]
    score = {"score": 0.5, "interval": [0.2, 0.9], "examples": 20}
    kinds = ["find a fact", "summarise", "count", "complete code", "few-shot label"]
    sweep = [
        {
            "method": method, "capacity": size, "token_match": 0.5, "rouge_l": 0.5, "kl_mean": 0.2,
            "kl_max": 1.0, "kept_fraction": 0.1, "kv_bytes": size * 2**10, "kv_bytes_full": 2**22,
            "answer": "<img src=x onerror='window.pwned=1'>",
        }
        for method in lab_layout.SIX[1:]
        for size in (16, 32, 64)
    ]  # fmt: skip
    return {
        "needle": lines("exact", fuzzy=0.6, trials=12, cells=cells),
        "longbench": lines("average", tasks={"multi_news": score, "qasper": score}),
        "sweep": sweep,
        "tasks": [
            {
                "method": "DynamicKV", "kinds": kinds, "documents": list("abcde"),
                "budgets": {kind: [64.0 + place] * 30 for place, kind in enumerate(kinds)},
                "asked": dict.fromkeys(kinds, 5),
                "distance": {
                    "documents": 5, "even": False, "within": 0.1, "across": 0.2,
                    "same_document": 0.2, "same_document_interval": [0.1, 0.3],
                    "separation": 0.1, "interval": [0.05, 0.15],
                },
                "moved": {a: {b: 0.3 for b in kinds} for a in kinds},
            }
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def lab_url(
    recorded: dict[str, Example], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A page with a tiny model and invented recordings."""
    folder = tmp_path_factory.mktemp("evidence")
    where = dict.fromkeys(
        ("date", "model", "dtype", "device", "cores", "torch", "transformers", "dynamickv"), "x"
    )
    for kind, summary in records().items():
        record = {"circumstances": where, "summary": summary}
        (folder / f"{kind}.json").write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_layout, "recorded", lambda kind: lab_model.recorded(kind, folder))
        patch.setenv("DYNAMICKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        host = ModelHost("tiny", loader=lambda name: tiny_llm())
        yield from serve(host, {"ordinary": recorded["ordinary"]})


def show(page: Page, url: str, part: str, query: str = "") -> None:
    """Open one part of the Lab and wait for its chart."""
    page.goto(url + query)
    expect(page.locator(".dkv-card")).to_have_count(2)
    page.get_by_role("tab", name="Lab", exact=True).click()
    choose(page, part)


def choose(page: Page, part: str) -> None:
    page.get_by_role("tab", name=part, exact=True).click()
    panel = page.locator(f"#dkv-lab-{part.lower()}")
    expect(panel.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    expect(panel.locator("table").first).to_be_visible()


def test_every_part_draws_and_axe_finds_nothing_serious(page: Page, lab_url: str) -> None:
    """In the dark theme, where contrast is harder; the whole page is looked at in both."""
    show(page, lab_url, PARTS[0], "?__theme=dark")
    for part in PARTS:
        choose(page, part)
        page.wait_for_timeout(400)  # colours stop changing
        found: dict[str, Any] = Axe().run(page).response
        serious = [
            (part, v["id"], [n["target"] for n in v["nodes"]][:4])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert serious == []
    assert page.evaluate("window.pwned") is None


def test_a_phone_shows_every_part_without_scrolling_sideways(page: Page, lab_url: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    show(page, lab_url, PARTS[0])
    for part in PARTS:
        choose(page, part)
        page.wait_for_timeout(300)
        over = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert over <= 0, part
        plot = page.locator(f"#dkv-lab-{part.lower()} .js-plotly-plot .main-svg").first
        box = plot.bounding_box()
        assert box is not None
        assert 200 < box["width"] <= 390


def test_a_grid_is_measured_and_its_figures_arrive(page: Page, lab_url: str) -> None:
    show(page, lab_url, "Needle")
    page.get_by_label("Capacities").fill("24")
    page.get_by_label("Lengths, in tokens").fill("400")
    page.get_by_label("number input for Depths").fill("2")
    page.get_by_label("number input for Texts per cell").fill("1")
    page.locator("#dkv-lab-needle-run").click()
    panel = page.locator("#dkv-lab-needle")
    expect(page.locator("#dkv-lab-needle-status")).to_contain_text("Done.", timeout=60_000)
    expect(panel).to_contain_text("Measured here 20")
    expect(panel).to_contain_text("here, capacity 24")
    expect(page.locator("#dkv-lab-needle-run")).to_be_enabled()
    expect(page.locator("#dkv-lab-needle-stop")).to_be_disabled()


def test_uploaded_examples_are_scored_and_their_figures_arrive(page: Page, lab_url: str) -> None:
    show(page, lab_url, "LongBench")
    row = {"context": DOCUMENT, "input": QUESTION, "answers": ["Who"], "all_classes": ["Who"]}
    file = {"name": "trec.jsonl", "mimeType": "text/plain", "buffer": json.dumps(row).encode()}
    with page.expect_file_chooser() as waiting:
        page.locator("#dkv-lab-longbench-run").click()
    waiting.value.set_files(file)
    status = page.locator("#dkv-lab-longbench-status")
    expect(status).to_contain_text("Done.", timeout=60_000)
    panel = page.locator("#dkv-lab-longbench")
    expect(panel).to_contain_text("Measured here 20")
    expect(panel).to_contain_text("trec")
    expect(page.locator("#dkv-lab-longbench-run")).to_be_enabled()
    expect(page.locator("#dkv-lab-longbench-stop")).to_be_disabled()


def test_stop_ends_the_uploaded_examples_and_keeps_what_was_measured(
    page: Page, lab_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = LongBenchExperiment.measure

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return measure(*args, **kwargs)

    monkeypatch.setattr(LongBenchExperiment, "measure", slowly)
    show(page, lab_url, "LongBench")
    row = {"context": DOCUMENT, "input": QUESTION, "answers": ["Who"], "all_classes": ["Who"]}
    lines = "\n".join(json.dumps(row | {"input": f"{QUESTION} {n}"}) for n in range(20))
    page.get_by_label("number input for Examples").fill("20")
    with page.expect_file_chooser() as waiting:
        page.locator("#dkv-lab-longbench-run").click()
    file = {"name": "trec.jsonl", "mimeType": "text/plain", "buffer": lines.encode()}
    waiting.value.set_files(file)
    status = page.locator("#dkv-lab-longbench-status")
    expect(status).to_contain_text(re.compile(r"[2-9] of 20"), timeout=60_000)
    page.locator("#dkv-lab-longbench-stop").click()
    expect(status).to_contain_text("Stopped", timeout=10_000)
    expect(page.locator("#dkv-lab-longbench")).to_contain_text("trec")
    expect(page.locator("#dkv-lab-longbench-run")).to_be_enabled()
    expect(page.locator("#dkv-lab-longbench-stop")).to_be_disabled()


def test_bad_input_is_said_in_one_sentence(page: Page, lab_url: str) -> None:
    show(page, lab_url, "Needle")
    page.set_viewport_size({"width": 1366, "height": 700})  # lower than the form
    page.get_by_label("Capacities").fill("many")
    page.get_by_label("Capacities").blur()
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("#dkv-lab-needle-run").evaluate("button => button.click()")  # without scrolling
    status = page.locator("#dkv-lab-needle-status")
    expect(status).to_contain_text("Capacity takes 1 to 12 whole numbers")
    field = page.locator("#dkv-lab-capacities textarea, #dkv-lab-capacities input")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_be_focused()
    expect(page.locator("[aria-invalid=true]")).to_have_count(1)
    expect(status.locator("[data-role=message]")).to_be_in_viewport(ratio=1)
    expect(page.locator("#dkv-lab-needle-run")).to_be_enabled()
    field.fill("64")
    expect(page.locator("[aria-invalid=true]")).to_have_count(0)


def test_a_sweep_is_saved_as_csv(page: Page, lab_url: str, tmp_path: Path) -> None:
    show(page, lab_url, "Sweep")
    with page.expect_download() as waiting:
        page.locator("#dkv-lab-sweep [data-role=save]").select_option("csv")
    assert waiting.value.suggested_filename == "dynamickv_sweep.csv"
    waiting.value.save_as(tmp_path / "s.csv")
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 16
