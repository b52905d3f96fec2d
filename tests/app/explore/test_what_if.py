"""What-if: chosen from the stored prefill, exactly what running would keep, and nobody else's."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pytest

import dynamickv as dkv
from app.examples import Example
from app.inputs import build_what_if
from app.serving.model_host import ModelHost
from app.serving.shelf import Shelf, trace_bytes
from dynamickv.record.trace import Trace
from tests.app.pages import Page, asking, filled, last
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

ASKED: dict[str, Any] = {
    "method": "DynamicKV",
    "settings": {"capacity": 40, "window_size": 4, "update_interval": 2},
}


@pytest.fixture(scope="module")
def llm() -> dkv.LoadedModel:
    return tiny_llm()


@pytest.fixture(scope="module")
def page(llm: dkv.LoadedModel) -> Page:
    """One page: every test asks about a run of its own."""
    host = ModelHost("tiny", loader=lambda name: llm)
    host.get("tiny")
    return Page(host)


def event(data: dict[str, Any]) -> gr.EventData:
    return gr.EventData(None, data)


def test_h2o_predicts_what_it_runs_once_its_attention_is_recorded(page: Page) -> None:
    store = run(page, ("H2O",))
    asked = {"method": "H2O", "settings": {"capacity": 30}, "key": store["key"]}
    predicted = page.explore.what_if.predict(asked)["run"]
    _, _, answered, *_ = answer(page, asked)
    made = answered["record"]["runs"][-1]
    assert (made["method"], made["retained"]) == ("H2O", predicted["retained"])


def test_a_marked_passage_is_in_the_record_and_in_the_label(page: Page) -> None:
    asked = {"method": "DynamicKV", "settings": {"capacity": 64}, "key": run(page)["key"]}
    asked |= {"pinned": [[40, 52]], "evicted": [[9, 12]]}
    _, cards, store, *_ = answer(page, asked)
    parameters = store["record"]["runs"][-1]["parameters"]
    assert (parameters["pinned"], parameters["evicted"]) == ([[40, 52]], [[9, 12]])
    assert cards["cards"][-1]["label"] == "DynamicKV, 12 tokens pinned, 3 evicted"
    status, *_ = answer(page, asked)
    assert status["message"] == "DynamicKV with these settings is answered already."


def test_a_run_leaves_every_observation_window_prepared(page: Page) -> None:
    key = run(page)["key"]
    held = page.shelf.get(key)
    assert held is not None
    assert held.prefill is not None
    # Its turn comes after all that is prepared.
    assert "run" in page.explore.what_if.predict(ASKED | {"key": key})
    for layer in held.prefill.recalling:
        assert list(layer.pieces) == layer.whole_pieces != []


def run(page: Page, methods: tuple[str, ...] = ("DynamicKV",), **changes: Any) -> dict[str, Any]:
    """Press Run; what the page then holds."""
    store: dict[str, Any] = page.press_run(methods=list(methods), capacity=64, **changes)[2]
    return store


def answer(page: Page, asked: Any, session: str = "a") -> tuple[Any, ...]:
    """Answer with what-if's settings; what the page then gets."""
    return tuple(last(page.explore.what_if.answer(asking(session), event(asked))))


@pytest.mark.parametrize(
    "asked",
    [
        ASKED,
        {"method": "SnapKV", "settings": {"capacity": 33, "kernel_size": 3, "pooling": "avg"}},
        {"method": "PyramidKV", "settings": {"capacity": 50}},
        {"method": "StreamingLLM", "settings": {"capacity": 21}},
        {"method": "ShiftKV", "settings": {"capacity": 30}},
        {"budgets": [10, 20, 30, 60, 20, 10], "settings": {"window_size": 5, "r_max": 3}},
        ASKED | {"pinned": [[40, 52]], "evicted": [[9, 12], [60, 61]]},
        {"method": "StreamingLLM", "settings": {"capacity": 21}, "pinned": [[40, 52]]},
        {"method": "SnapKV", "settings": {"capacity": 33, "head_budgets": "adaptive"}},
        ASKED | {"settings": {"capacity": 40, "head_budgets": "adaptive"}, "evicted": [[9, 12]]},
        {"budgets": [10, 20, 30, 60, 20, 10], "pinned": [[40, 52]], "settings": {}},
        {"method": "DynamicKV", "settings": {"capacity": 40, "granularity": "query_head"}},
    ],
    ids=lambda asked: asked.get("method", "drawn"),
)
def test_what_is_predicted_is_what_is_run(page: Page, asked: dict[str, Any]) -> None:
    store = run(page)
    assert store["ready"]
    asked = asked | {"key": store["key"]}
    predicted = page.explore.what_if.predict(asked)["run"]
    status, cards, answered, *_ = answer(page, asked)
    assert status["message"] == "Done."
    made = answered["record"]["runs"][-1]
    for field in ("method", "parameters", "budgets", "budget_history", "retained", "kv_bytes"):
        assert predicted[field] == made[field], field
    assert predicted["kept_fraction"] == made["kept_fraction"]
    assert [run["method"] for run in answered["record"]["runs"][:2]] == ["FullKV", "DynamicKV"]
    assert len(cards["cards"]) == 3


def test_the_answer_is_that_of_a_run_from_the_start(page: Page, llm: dkv.LoadedModel) -> None:
    store = run(page)
    asked = ASKED | {"key": store["key"]}
    _, _, answered, *_ = answer(page, asked)
    method = build_what_if(asked)
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.FullKV(), method], max_new_tokens=6)
    made = answered["record"]["runs"][-1]
    assert made["token_ids"] == trace.runs[1].token_ids
    assert made["agreement"]["first_divergence"] == (
        trace.runs[1].agreement and trace.runs[1].agreement.first_divergence
    )


def test_a_new_answer_takes_the_place_of_the_last_what_if(page: Page) -> None:
    key = run(page)["key"]
    for capacity in (40, 50):
        asked = {"key": key, "method": "DynamicKV", "settings": {"capacity": capacity}}
        _, _, store, *_ = answer(page, asked)
    names = [look["label"] for look in store["looks"]]
    assert names == ["FullKV", "DynamicKV", "DynamicKV, capacity 50"]
    same = {"key": key, "method": "DynamicKV", "settings": {"capacity": 64}}
    status, *_ = answer(page, same)
    assert status["message"] == "DynamicKV with these settings is answered already."


@pytest.fixture(scope="module")
def refused_key(page: Page) -> str:
    """The key of a run about which only what is refused is asked."""
    key: str = run(page)["key"]
    return key


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"key": "guessed"}, "no longer holds this run"),
        ({"key": None}, "no longer holds this run"),
        ({"key": ["x"]}, "no longer holds this run"),
        ({"key": "example:../../etc/passwd"}, "no longer holds this run"),
        ({"method": "Magic"}, "Unknown method 'Magic'"),
        ({"method": "FullKV"}, "Unknown method 'FullKV'"),
        ({"method": ["DynamicKV"]}, "Unknown method"),
        ({"method": "H2O", "settings": {"capacity": 40}}, "tick H2O and press Run once"),
        ({"settings": {"capacity": 4}}, "must exceed Window size 8"),
        ({"settings": {"capacity": 80, "window_size": 65}}, "Window size 65"),
        ({"settings": {"capacity": 1e9}}, "between 1 and"),
        ({"settings": "x"}, "a method and its settings"),
        ({"settings": {"capacity": 40, "pooling": "<script>"}}, "Pooling must be"),
        ({"budgets": []}, "one number of tokens per layer"),
        ({"budgets": [20, 20]}, "Budgets has 2 numbers and the model 6 layers"),
        ({"budgets": [20.5] * 6}, "whole number"),
        ({"budgets": [-1] * 6}, "between 0 and"),
        ({"budgets": "999999"}, "one number of tokens per layer"),
        ({"pinned": "all"}, "Pinned must be a list of at most 64 passages"),
        ({"pinned": [[1, 2]] * 65}, "Pinned must be a list of at most 64 passages"),
        ({"evicted": [[1]]}, "Evicted must hold [first, last) pairs"),
        ({"evicted": [[1, "<b>"]]}, "whole number, got '<b>'"),
        ({"evicted": [[5, 5]]}, "Evicted must hold [first, last) pairs"),
        ({"pinned": [[0, 900_000]]}, "mark a passage inside it"),
        ({"evicted": [[5, 9]], "pinned": [[8, 12]]}, "overlap"),
        ({"settings": {"capacity": 40, "head_budgets": "x"}}, "head_budgets must be"),
    ],
)
def test_a_bad_what_if_is_one_sentence(
    page: Page, refused_key: str, changes: dict[str, Any], sentence: str
) -> None:
    asked = ASKED | {"key": refused_key} | changes
    assert sentence in page.explore.what_if.predict(asked)["error"]
    status, *_ = answer(page, asked)
    assert status["state"] == "error"
    assert sentence in status["message"]


@pytest.mark.parametrize("asked", [None, [], "x", 7, {}])
def test_nonsense_from_a_browser_is_one_sentence(page: Page, asked: Any) -> None:
    assert "no longer holds" in page.explore.what_if.predict(asked)["error"]
    assert "no longer holds" in page.explore.evidence.scores(asked)["error"]


def test_a_recorded_run_is_read_once_and_then_answers(
    page: Page, llm: dkv.LoadedModel, tmp_path: Any
) -> None:
    trace = dkv.compare(
        llm,
        DOCUMENT,
        QUESTION,
        methods=[dkv.FullKV(), dkv.DynamicKV(capacity=64)],
        max_new_tokens=6,
        scores=True,
    )
    trace.save(tmp_path / "one.json.gz")
    page.examples["one"] = Example(
        id="one", title="One", kind="", question=QUESTION, capacity=64, max_new_tokens=6,
        document=DOCUMENT, run_file=tmp_path / "one.json.gz",
    )  # fmt: skip
    key = page.examples["one"].key
    assert "read it first" in page.explore.what_if.predict(ASKED | {"key": key})["error"]
    assert (
        page.explore.evidence.scores({"key": key, "run": 1})["bytes"] == trace.runs[1].scores.bytes
    )  # type: ignore[union-attr]
    assert page.explore.evidence.scores({"key": key, "run": 0})["bytes"] is None
    assert "between 0 and 1" in page.explore.evidence.scores({"key": key, "run": 2})["error"]
    status, panel, *_ = last(page.explore.what_if.read(asking(), event({"key": key})))
    assert status["message"].startswith("The prompt is read")
    asked = ASKED | {"key": panel["key"]}
    assert page.explore.what_if.predict(asked)["run"]["budgets"]
    _, cards, store, *_ = answer(page, asked)
    assert cards["source"].startswith("recorded on")
    assert cards["source"].endswith(", one run added here")
    assert store["record"]["prefill_seconds"] == trace.prefill_seconds


def test_a_document_read_before_the_question_predicts_the_same(page: Page) -> None:
    asked = ASKED | {"key": run(page, question_aware=False)["key"]}
    predicted = page.explore.what_if.predict(asked)["run"]
    _, _, store, *_ = answer(page, asked)
    assert store["record"]["runs"][-1]["retained"] == predicted["retained"]


def test_beside_runs_that_go_on_compressing_the_answer_does_too(page: Page) -> None:
    key = run(page, decode_budget=24, decode_buffer=2)["key"]
    asked = ASKED | {"key": key, "settings": {"capacity": 60}}
    predicted = page.explore.what_if.predict(asked)["run"]
    _, _, store, *_ = answer(page, asked)
    made = store["record"]["runs"][-1]
    assert made["decoding"] == {"budget": 24, "buffer": 2}
    assert made["retained"] == predicted["retained"]
    drawn = ASKED | {"key": key, "budgets": [20] * 6}
    _, _, store, *_ = answer(page, drawn)
    assert store["record"]["runs"][-1]["decoding"] is None  # drawn budgets are not chosen again


def test_stop_ends_an_answer_and_keeps_what_there_is(page: Page) -> None:
    key = run(page)["key"]
    begun = page.explore.run.begin(asking("b"), *filled())
    assert next(begun)[0]["state"] == "running"
    page.explore.run.stop(asking("b"))
    status, _, store, *_ = answer(page, ASKED | {"key": key}, "b")
    assert status["message"].startswith("Stopped")
    assert store["record"]["runs"][-1]["finish_reason"] == "cancelled"


def test_keys_cannot_be_guessed_and_differ(page: Page) -> None:
    keys = {run(page)["key"] for _ in range(3)}
    assert len(keys) == 3
    assert min(map(len, keys)) >= 32


def test_the_shelf_is_bounded_and_drops_the_longest_unused(
    trace: Trace, llm: dkv.LoadedModel
) -> None:
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    shelf = Shelf(prefill.nbytes * 2, trace_bytes(trace) * 3)
    keys = [shelf.put(trace, "run", "tiny", prefill) for _ in range(3)]
    held = [shelf.get(key) for key in keys]
    assert [h is not None and h.prefill is not None for h in held] == [False, True, True]
    shelf.get(keys[0])
    newest = shelf.put(trace, "run")
    assert shelf.get(keys[1]) is None
    assert shelf.get(keys[0]) is not None
    assert shelf.get(newest) is not None
