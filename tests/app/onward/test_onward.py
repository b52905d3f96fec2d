"""On from a run: the smallest capacity, another question, and earlier runs, without a browser."""

from __future__ import annotations

import base64
from typing import Any

import gradio as gr
import numpy as np
import pytest

import dynamickv as dkv
from app.onward.handlers import RESTORED, HistoryHandlers, OnwardHandlers
from app.onward.view_model import facts_of, marks_of, methods_of
from app.serving.model_host import ModelHost
from tests.app.pages import Page, asking, last
from tests.engine.tiny import DOCUMENT, tiny_llm

SECOND = "When was the harbour built?"


@pytest.fixture(scope="module")
def llm() -> dkv.LoadedModel:
    return tiny_llm()


@pytest.fixture
def page(llm: dkv.LoadedModel) -> Page:
    host = ModelHost("tiny", loader=lambda name: llm)
    host.get("tiny")
    return Page(host)


@pytest.fixture
def onward(page: Page) -> OnwardHandlers:
    explore = page.explore
    return OnwardHandlers(page.host, explore.predictions, explore.run.guarded, page.examples)


def event(**data: Any) -> gr.EventData:
    return gr.EventData(None, data)


def run(page: Page, *methods: str, **changes: Any) -> tuple[str, dkv.Trace]:
    """Press Run; the run's key and its record."""
    store = page.press_run(methods=list(methods), capacity=40, **changes)[2]
    held = page.shelf.get(store["key"])
    assert held is not None
    return store["key"], held.trace


def told(shows: Any) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Every status, and the panel's last payload."""
    steps = list(shows)
    panels = [step[1] for step in steps if isinstance(step[1], dict) and "key" in step[1]]
    return [step[0] for step in steps], panels[-1] if panels else None


def test_every_methods_smallest_capacity_is_what_the_engine_finds(
    page: Page, onward: OnwardHandlers, llm: dkv.LoadedModel
) -> None:
    key, trace = run(page, "SnapKV", "DynamicKV")
    held = page.shelf.get(key)
    assert held is not None
    assert held.prefill is not None
    statuses, panel = told(onward.smallest(asking(), event(key=key)))
    assert panel is not None
    assert statuses[-1]["message"] == "Done."
    assert any("more" in status["detail"] for status in statuses[1:])
    rows = panel["smallest"]["rows"]
    assert [row["label"] for row in rows] == ["SnapKV", "DynamicKV"]
    for row, at in zip(rows, methods_of(trace), strict=True):
        found = dkv.smallest_capacity(
            llm, held.prefill, at.method, full=trace.run("FullKV"), max_new_tokens=6
        )
        assert found is not None
        assert row["capacity"] == found.capacity
    assert panel["smallest"]["how"].startswith("No word of FullKV's answer")


def test_what_the_user_expects_is_what_must_be_answered(page: Page, onward: OnwardHandlers) -> None:
    key, trace = run(page, "SnapKV")
    word = trace.run("FullKV").answer.split()[0]
    key, trace = run(page, "SnapKV", expected=word)
    assert facts_of(trace, ()) == [word]
    _, panel = told(onward.smallest(asking(), event(key=key)))
    assert panel is not None
    assert panel["smallest"]["how"] == f"The answer must hold what is expected: {word}."


def test_a_search_is_stopped_between_two_capacities(page: Page, onward: OnwardHandlers) -> None:
    key, _ = run(page, "SnapKV", "DynamicKV")
    seen = []
    for status, *_ in onward.smallest(asking("s"), event(key=key)):
        seen.append(status["message"])
        if "SnapKV at" in status["message"]:
            page.explore.run.stop(asking("s"))
    assert seen[-1] == "Stopped: what was found is shown."
    assert len([words for words in seen if "SnapKV at" in words]) == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"key": "nobody's"}, "The page no longer holds this run: press Run once."),
        ({}, "The page no longer holds this run: press Run once."),
    ],
)
def test_a_run_that_is_not_held_is_refused_in_one_sentence(
    onward: OnwardHandlers, asked: dict[str, Any], words: str
) -> None:
    for shows in (onward.smallest, onward.ask):
        statuses, panel = told(shows(asking(), event(**asked)))
        assert statuses[-1]["message"] == words
        assert panel is None


def test_a_run_that_compressed_nothing_is_refused(page: Page, onward: OnwardHandlers) -> None:
    key, _ = run(page, "FullKV")
    statuses, _ = told(onward.smallest(asking(), event(key=key)))
    assert statuses[-1]["message"].startswith("No method of this run compresses")


def test_another_question_goes_on_from_every_cache(
    page: Page, onward: OnwardHandlers, llm: dkv.LoadedModel
) -> None:
    key, trace = run(page, "SnapKV", "DynamicKV")
    held = page.shelf.get(key)
    assert held is not None
    assert held.prefill is not None
    statuses, panel = told(onward.ask(asking(), event(key=key, question=f"  {SECOND} ")))
    assert statuses[-1]["message"] == "Done."
    assert panel is not None
    assert panel["asked"]["question"] == SECOND
    rows = panel["asked"]["rows"]
    for row, at in zip(rows, methods_of(trace, compressing=False), strict=True):
        talk = dkv.Conversation(llm, held.prefill, at.method)
        talk.answer(len(at.run.token_ids))
        assert row["answer"] == talk.ask(SECOND, 64)
    first = dkv.compare(
        llm, DOCUMENT, SECOND, methods=[methods_of(trace)[0].method], max_new_tokens=64
    )
    assert rows[1]["first"] == first.runs[0].answer
    # FullKV holds all that any question would keep.
    assert "marks" not in rows[0]
    # The record on the shelf stays as it was.
    assert page.shelf.get(key).trace is trace  # type: ignore[union-attr]


def test_marks_are_what_the_other_question_keeps_and_what_of_it_is_gone(
    page: Page, llm: dkv.LoadedModel
) -> None:
    _, trace = run(page, "SnapKV")
    method = methods_of(trace)[0].method
    other = dkv.compare(llm, DOCUMENT, SECOND, methods=[method], max_new_tokens=1)
    marks = marks_of(trace.runs[1], other.runs[0], trace, other)
    layers = trace.model.num_layers
    first, end = trace.prompt.document_span
    now = trace.runs[1].retained.unpack(layers, trace.prompt.length)[:, :, first : end - 1]
    then = other.runs[0].retained.unpack(layers, other.prompt.length)[:, :, first : end - 1]
    wanted = np.frombuffer(base64.b64decode(marks["wanted"]), np.uint8)
    gone = np.frombuffer(base64.b64decode(marks["gone"]), np.uint8)
    assert np.array_equal(wanted > 0, then.any(axis=(0, 1)))
    assert np.array_equal(gone > 0, (then & ~now).any(axis=(0, 1)))
    assert marks["held_share"] == pytest.approx((then & now).sum() / then.sum())
    assert 0 < marks["held_share"] < 1
    same = marks_of(trace.runs[1], trace.runs[1], trace, trace)
    assert same["held_share"] == 1


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("   ", "The other question is empty: type what else you want to know."),
        (None, "The other question is empty: type what else you want to know."),
        ("x" * 20_001, "The question has 20,001 characters"),
    ],
)
def test_a_bad_question_is_refused_in_one_sentence(
    page: Page, onward: OnwardHandlers, question: Any, words: str
) -> None:
    key, _ = run(page, "SnapKV")
    statuses, panel = told(onward.ask(asking(), event(key=key, question=question)))
    assert statuses[-1]["message"].startswith(words)
    assert panel is None


def test_a_run_that_did_not_see_its_question_takes_no_other(
    page: Page, onward: OnwardHandlers
) -> None:
    key, _ = run(page, "SnapKV", question_aware=False)
    statuses, _ = told(onward.ask(asking(), event(key=key, question=SECOND)))
    assert statuses[-1]["message"].startswith("This run was compressed before its question")


def test_an_earlier_run_comes_back_with_its_text_and_settings(page: Page) -> None:
    key, trace = run(page, "SnapKV")
    page.press_run(methods=["DynamicKV"], capacity=64, question="And now?")
    history = HistoryHandlers(page.explore.predictions, page.shown, page.host.names)
    found = dict(zip(RESTORED, history.restored({"key": key}), strict=True))
    assert found["store"]["key"] == key
    assert found["question"] == trace.prompt.question
    assert found["capacity"] == 40
    assert "SnapKV" in found["methods"]
    assert found["example"] == "own"


@pytest.mark.parametrize("asked", [{"key": "another tab's"}, {"key": 3}, None, "x"])
def test_a_run_that_is_gone_is_said_and_changes_nothing(page: Page, asked: Any) -> None:
    history = HistoryHandlers(page.explore.predictions, page.shown, page.host.names)
    found = dict(zip(RESTORED, history.restored(asked), strict=True))
    assert found["status"]["message"].startswith("The page no longer holds that run")
    assert found["store"] == gr.skip()


def test_the_last_status_leaves_the_page_usable(page: Page, onward: OnwardHandlers) -> None:
    key, _ = run(page, "SnapKV")
    _, _, pressed, stopped = last(onward.smallest(asking(), event(key=key)))
    assert (pressed["interactive"], stopped["interactive"]) == (True, False)
