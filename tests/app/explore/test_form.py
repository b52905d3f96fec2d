"""The form: examples, links and records put into it, counts, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import gradio as gr
import pytest
import torch

from app.examples import OWN_TEXT, Example
from app.explore.handlers import FormHandlers
from app.explore.handlers.form import LINKED, PICKED
from app.form import FIELDS, form_of
from app.record.words import document_of
from app.serving.model_host import ModelHost
from app.settings import SETTINGS
from dynamickv.models import LoadedModel
from dynamickv.record.trace import Trace
from tests.app.pages import Page, asking, filled
from tests.engine.tiny import tiny_llm


def test_handlers_validate_like_the_endpoint(host: ModelHost) -> None:
    events = Page(host).explore.run.begin(asking(), *filled(document=" ", model=host.default))
    status, *_ = next(events)
    assert status["state"] == "error"
    with pytest.raises(gr.Error, match="document is empty"):
        next(events)


def test_errors_are_escaped_for_the_toast(host: ModelHost) -> None:
    values = filled(methods=["<img onerror=x>"], model=host.default)
    events = Page(host).explore.run.begin(asking(), *values)
    next(events)
    with pytest.raises(gr.Error) as caught:
        next(events)
    assert "<img" not in str(caught.value.message)


def test_counts_are_honest_before_the_model_is_there(host: ModelHost) -> None:
    counted = Page(host).explore.form.count("word " * 420, "Who?", host.default)
    assert counted["value"] == "about 500 tokens"
    assert counted["tokens"] == 500


def test_the_head_says_how_the_chosen_model_stands(host: ModelHost) -> None:
    form = Page(host).explore.form
    host.start()
    assert host.wait(5)
    assert form.model_state(host.default)["state"] == "failed"
    chosen = form.model_state("smollm2-360m")
    assert chosen["message"] == "smollm2-360m loads when it is used"


def test_picking_an_example_shows_its_record(host: ModelHost, example: Example) -> None:
    picked = Page(host, {"one": example}).explore.form.pick("one")
    shown = dict(zip(PICKED, picked, strict=True))
    assert example.trace is not None
    assert shown["document"] == document_of(example.trace.prompt)
    assert shown["question"] == example.question
    assert (shown["capacity"], shown["window_size"]) == (96, 16)
    # The form says what is on screen: pressing Run runs the same again.
    assert shown["methods"] == ["FullKV", "DynamicKV"]
    assert set(FIELDS) <= set(shown)
    assert shown["cards"]["final"]
    assert shown["store"]["example"] == "one"
    assert shown["store"]["record"]["runs"][1]["method"] == "DynamicKV"


def test_an_example_picked_during_a_run_leaves_what_is_watched(
    host: ModelHost, example: Example
) -> None:
    page = Page(host, {"one": example})
    next(page.explore.run.begin(asking("a"), *filled(model=host.default)))
    during = dict(zip(PICKED, page.explore.form.pick("one", asking("a")), strict=True))
    other = dict(zip(PICKED, page.explore.form.pick("one", asking("b")), strict=True))
    assert during["question"] == other["question"] == example.question
    assert other["cards"]["final"]
    skipped = gr.skip()
    assert [during[name] for name in ("cards", "store", "status")] == [skipped] * 3


def test_a_changed_text_lets_go_of_the_example(host: ModelHost, example: Example) -> None:
    handlers = Page(host, {"one": example}).explore.form
    assert handlers.own_text("The river rose again!", "one") == OWN_TEXT
    for same in (example.document, example.document + "\n"):
        assert handlers.own_text(same, "one") == gr.skip()
    assert handlers.own_text("anything", None) == gr.skip()


def test_run_waits_for_a_text_and_a_question(host: ModelHost) -> None:
    handlers = Page(host).explore.form
    for document, question in (("", "Who?"), (" ", "Who?"), ("The river.", ""), ("", "")):
        assert handlers.ready(document, question, asking())["interactive"] is False
    assert handlers.ready("The river.", "Who?", asking())["interactive"] is True


def test_typing_while_a_run_is_on_leaves_its_buttons_alone(host: ModelHost) -> None:
    page = Page(host)
    begun = page.explore.run.begin(asking(), *filled(model=host.default))
    next(begun)
    assert page.explore.form.ready("The river.", "Who?", asking()) == gr.skip()


def test_what_reads_all_attention_says_its_price_where_it_is_chosen(host: ModelHost) -> None:
    page = Page(host)
    said = page.explore.form.price(["FullKV", "H2O"])["note"]
    assert said == "H2O reads the whole attention matrix: about 2.0 times the reading."
    assert page.explore.form.price(["FullKV", "DynamicKV"])["note"] == ""


@pytest.mark.parametrize(
    "changes",
    [{"pooling": "<img>"}, {"kernel_size": "7"}, {"window_size": 0}, {"r_max": None}, {"x": 1}],
)
def test_a_record_with_strange_parameters_leaves_the_form_its_own(
    host: ModelHost, trace: Trace, changes: dict[str, Any]
) -> None:
    run = trace.run("DynamicKV")
    strange = replace(trace, runs=[replace(run, parameters={**run.parameters, **changes})])
    values = form_of(strange, host.names)
    assert [values[name] for name in SETTINGS[1:6]] == [8, 7, "max", "kv_head", 10]
    assert values["document"] == document_of(trace.prompt)


@pytest.mark.parametrize(
    ("asked", "capacity", "said"),
    [
        ("512", 512, "The link asks for capacity 512; the run shown was recorded at 96."),
        ("96", 96, ""),
        *((text, None, "") for text in ("", "7", "2049", "-8", "1e2", "٦٤", "99999", "<b>")),
    ],
)
def test_a_link_sets_the_capacity_and_says_of_which_the_run_is(
    host: ModelHost, example: Example, asked: str, capacity: int | None, said: str
) -> None:
    handlers = Page(host, {"zero": replace(example, id="zero"), "one": example}).explore.form
    for name, place in (("zero", 0), ("one", 96)):
        linked = handlers.link(gr.Request(query_params={"ex": name, "b": asked}))
        shown = dict(zip(LINKED, linked, strict=True))
        there = gr.skip() if place == 0 else place
        assert shown["capacity"] == (there if capacity is None else capacity)
        assert shown["status"].get("message", "") == said


def test_ticking_methods_sends_nothing_back_unless_fullkv_went() -> None:
    assert FormHandlers.lock_reference(["SnapKV", "FullKV"]) == gr.skip()
    assert FormHandlers.lock_reference(["H2O", "SnapKV"]) == ["FullKV", "H2O", "SnapKV"]


def test_the_capacity_is_counted_in_the_format_that_the_model_holds(
    host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "ready", lambda _: tiny_llm())
    form = Page(host).explore.form

    def mebibytes() -> float:
        line = form.capacity_line(10**7, None, "kv_head", host.default)
        return float(re.findall(r"([0-9.]+) MiB", str(line))[0])

    held = mebibytes()
    monkeypatch.setattr(LoadedModel, "held_dtype", property(lambda _: torch.float64))
    assert mebibytes() == pytest.approx(2 * held)
