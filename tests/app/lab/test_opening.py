"""A cell of the Lab opens the run that was measured: the same text, question and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

import dynamickv as dkv
from app.examples import ASSETS, load_examples
from app.lab.handlers import OPENED, LabHandlers, OpeningHandlers
from app.lab.view_model import needle_form, needle_panel, recorded
from app.serving.model_host import ModelHost
from app.serving.turns import Turns
from app.views import lab_needle
from dynamickv.evaluate.needle import NeedleExperiment, NeedleGrid
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

LAB = ASSETS.parent / "benchmarks" / "results" / "lab"
JOURNALS = {"needle-smollm2": "needle.jsonl", "longbench": "multi_news/results.jsonl"}
GRID = ("tiny", ["FullKV", "SnapKV"], "24", "400", 2, 2, 1)


@pytest.fixture(scope="module")
def host() -> ModelHost:
    llm = tiny_llm()
    return ModelHost("tiny", loader=lambda name: llm)


@pytest.fixture
def opening(host: ModelHost) -> OpeningHandlers:
    return OpeningHandlers(host, {}, Turns())


@pytest.fixture
def measuring(host: ModelHost, tmp_path: Path) -> LabHandlers:
    return LabHandlers(host, [], Turns(), folder=tmp_path / "kept")


def form(opening: OpeningHandlers, asked: Any, *shown: str) -> dict[str, Any]:
    """What opening sends to the page at the end, by the widgets' names."""
    *_, values = opening.opened(None, asked, *(shown or ("", "")))
    return dict(zip(OPENED, values, strict=True))


def panel_of(steps: Any) -> dict[str, Any]:
    panels = [step[1] for step in steps if "cells" in (step[1] or {})]
    return json.loads(json.dumps(panels[-1]))  # type: ignore[no-any-return]


def asked_of(panel: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """As the browser sends it: JSON has one kind of number."""
    return json.loads(  # type: ignore[no-any-return]
        json.dumps({"kind": panel["kind"], "settings": panel["settings"], "cell": cell["open"]})
    )


def test_a_needle_cell_opens_the_text_that_was_measured(
    opening: OpeningHandlers, measuring: LabHandlers, host: ModelHost
) -> None:
    panel = panel_of(measuring.needle(None, *GRID))  # type: ignore[arg-type]
    cell = next(c for c in panel["cells"] if c["open"]["method"] == "SnapKV" and c["open"]["depth"])
    grid = NeedleGrid(lengths=(400,), depths=(0.0, 1.0), samples=2)
    unit = {"length": 400, "depth": 1.0, "sample": cell["open"]["sample"]}
    document, hidden = NeedleExperiment(host.get("tiny"), grid).document(unit)
    found = form(opening, asked_of(panel, cell))
    assert (found["document"], found["question"]) == (document, hidden.question)
    assert found["expected"] == hidden.expected[0]
    assert (found["capacity"], found["model"], found["max_new_tokens"]) == (24, "tiny", 32)
    assert found["methods"] == ["FullKV", "SnapKV", "DynamicKV"]
    assert found["tabs"]["selected"] == "explore"


def test_a_depth_that_json_wrote_as_a_whole_number_means_the_same_text(
    opening: OpeningHandlers, measuring: LabHandlers
) -> None:
    panel = panel_of(measuring.needle(None, *GRID))  # type: ignore[arg-type]
    asked = asked_of(panel, panel["cells"][0])
    whole = {**asked, "cell": {**asked["cell"], "depth": int(asked["cell"]["depth"])}}
    assert form(opening, whole)["document"] == form(opening, asked)["document"]


def test_a_sweeps_point_opens_while_its_text_stands_on_explore(
    opening: OpeningHandlers, measuring: LabHandlers
) -> None:
    panel = panel_of(measuring.sweep(None, DOCUMENT, QUESTION, "tiny", ["SnapKV"], 8))
    asked = asked_of(panel, panel["cells"][0])
    found = form(opening, asked, DOCUMENT, QUESTION)
    assert (found["document"], found["capacity"], found["max_new_tokens"]) == (DOCUMENT, 16, 8)
    with pytest.raises(gr.Error):
        form(opening, asked, DOCUMENT, "Another question?")


def test_a_row_of_tasks_opens_a_document_with_that_question(
    host: ModelHost, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(DOCUMENT + name)
    own = {"a": {"count": "How many?"}, "b": {"complete code": "Write the next line."}}
    (tmp_path / "questions.json").write_text(json.dumps(own))
    opening = OpeningHandlers(host, {}, Turns(), task_folder=tmp_path)
    settings = {"model": "tiny", "capacity": 24, "method": "PyramidKV"}
    asked = {"kind": "tasks", "settings": settings, "cell": {"kind": "complete code"}}
    found = form(opening, asked)
    assert found["document"] == DOCUMENT + "b"
    assert found["question"] == "Write the next line."
    assert "PyramidKV" in found["methods"]


def test_a_longbench_point_opens_the_example_that_its_panel_brought(
    opening: OpeningHandlers, measuring: LabHandlers, tmp_path: Path
) -> None:
    file = tmp_path / "trec.jsonl"
    row = {"context": DOCUMENT, "input": QUESTION, "answers": ["Who"], "all_classes": ["Who"]}
    file.write_text(json.dumps({**row, "_id": "one"}) + "\n")
    steps = measuring.longbench(None, str(file), "tiny", "the file's name", ["FullKV"], "24", 1)
    del steps
    steps = measuring.longbench(None, str(file), "tiny", "trec", ["FullKV", "SnapKV"], "24", 1)
    panel = panel_of(steps)
    cell = panel["cells"][-1]
    document, question = panel["texts"][cell["open"]["example"]]
    assert DOCUMENT in document
    assert QUESTION in question
    asked = asked_of(panel, cell)
    asked["cell"]["text"] = [document, question]
    found = form(opening, asked)
    assert (found["document"], found["question"]) == (document, question)
    assert "chat template" in found["status"]["detail"]


@pytest.mark.parametrize(
    "asked",
    [
        None,
        {"kind": "else", "cell": {}, "settings": {}},
        {"kind": "needle", "cell": {}, "settings": {"model": "someone/model"}},
        {"kind": "needle", "cell": {"length": 10**9, "depth": 0}, "settings": {"model": "tiny"}},
        {
            "kind": "needle",
            "cell": {"length": 400, "depth": "<img>", "sample": 0},
            "settings": {"model": "tiny", "haystack": "generated", "needles": 1, "seed": 0},
        },
        {"kind": "tasks", "cell": {"kind": "nothing"}, "settings": {"model": "tiny"}},
        {"kind": "longbench", "cell": {"text": [1, 2]}, "settings": {"model": "tiny"}},
        {"kind": "sweep", "cell": {}, "settings": {"model": "tiny", "max_new_tokens": 8}},
    ],
)
def test_what_is_no_cell_is_refused_in_one_sentence(opening: OpeningHandlers, asked: Any) -> None:
    steps = opening.opened(None, asked, DOCUMENT, QUESTION)
    seen: list[list[Any]] = []
    with pytest.raises(gr.Error):
        seen.extend(steps)
    status = dict(zip(OPENED, seen[-1], strict=True))["status"]
    assert status["state"] == "error"
    assert status["message"].endswith(".")
    assert "Traceback" not in status["message"]


def line(method: str, size: int | None, exact: dict[tuple[int, float], float]) -> dict[str, Any]:
    cells = [{"length": n, "depth": d, "exact": e, "samples": 4} for (n, d), e in exact.items()]
    return {
        "method": method, "capacity": size, "kept_fraction": 0.1, "kv_bytes": 2**20,
        "exact": sum(exact.values()) / len(exact), "interval": [0.1, 0.9], "fuzzy": 0.5,
        "trials": 8, "over_snapkv": None, "cells": cells,
    }  # fmt: skip


SUMMARY = [
    line("FullKV", None, {(1024, 0.0): 1.0, (1024, 1.0): 0.25}),
    line("SnapKV", 64, {(1024, 0.0): 0.5, (1024, 1.0): 0.25}),
]


def test_cells_that_fullkv_does_not_find_are_grey_and_say_so() -> None:
    _, _, scores, grey = lab_needle.render(SUMMARY).plot.data
    assert [list(row) for row in scores.z] == [[0.5], [None]]
    assert [list(row) for row in grey.z] == [[None], [1]]
    words = {cell["words"] for cell in lab_needle.cells(SUMMARY)}
    assert "SnapKV, capacity 64: 1,024 tokens, depth 0 %: 50 % found; FullKV 100 %" in words
    assert any(text.endswith("so the model cannot do this cell") for text in words)


def test_scores_are_also_shares_of_fullkvs() -> None:
    panel = needle_panel(SUMMARY, "now", {"model": "tiny"})
    relative = panel["relative"]["layout"]["annotations"]
    assert [note["text"] for note in relative] == [
        "<b>FullKV</b><br>100 % of FullKV",
        "<b>SnapKV</b><br>64: 60 % of FullKV",
    ]
    rows = [line.split(",") for line in panel["csv"]["text"].splitlines()]
    assert rows[0][-2:] == ["exact", "exact_of_fullkv"]
    assert rows[3][-2:] == ["0.5", "0.5"]


def test_a_picture_is_titled_with_model_capacities_and_methods() -> None:
    caption = needle_panel(SUMMARY, "now", {"model": "tiny"})["caption"]
    assert caption.splitlines()[1] == "tiny · capacity 64 · FullKV, SnapKV"


def test_the_form_begins_with_the_grid_recorded_on_the_pages_own_model() -> None:
    form = needle_form()
    record = json.loads((ASSETS / "evidence" / "needle-smollm2.json").read_text("utf-8"))
    assert record["circumstances"]["model"] == dkv.DEFAULT_MODEL
    cells = record["summary"][0]["cells"]
    sizes = {line["capacity"] for line in record["summary"]} - {None}
    assert set(form["lengths"].split(", ")) == {str(cell["length"]) for cell in cells}
    assert set(form["capacities"].split(", ")) == {str(size) for size in sizes}
    assert form["depths"] == len({cell["depth"] for cell in cells})


@pytest.mark.parametrize("kind", ["needle", "sweep", "tasks", "longbench"])
def test_a_recorded_panel_names_every_cell_and_says_one_sentence(kind: str) -> None:
    panel = recorded(kind)
    assert panel["cells"]
    shown = "qwen2.5-coder-0.5b" if kind == "needle" else "smollm2-135m"
    assert panel["settings"]["model"] == shown
    assert panel["csv"]["text"].count("\n") > 2
    assert len(panel["said"]) == (kind != "sweep")
    assert all(sentence.count(". ") == 0 for sentence in panel["said"])


@pytest.mark.parametrize("kind", ["needle", "needle-smollm2", "sweep", "tasks", "longbench"])
def test_recorded_settings_are_those_that_were_measured_with(kind: str) -> None:
    record = json.loads((ASSETS / "evidence" / f"{kind}.json").read_text("utf-8"))
    settings, at = record["settings"], record["circumstances"]
    named = ("model", "revision", "dtype")
    assert [settings[name] for name in named] == [at[name] for name in named]
    journal = JOURNALS.get(kind)
    if journal is not None:
        with (LAB / journal).open(encoding="utf-8") as lines:
            assert settings == json.loads(next(lines))["settings"]


def test_the_recorded_sweep_opens_its_example() -> None:
    examples = load_examples()
    host = ModelHost("smollm2-135m", loader=lambda name: tiny_llm())
    panel = recorded("sweep")
    found = form(OpeningHandlers(host, examples, Turns()), asked_of(panel, panel["cells"][0]))
    assert found["document"] == examples["harbour-report"].document
    assert found["model"] == dkv.DEFAULT_MODEL
