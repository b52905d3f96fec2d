"""What the browser gets of an answer's attention: from the stored prefill, or one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import dynamickv as dkv
from app.explore.handlers import evidence
from app.serving.model_host import ModelHost
from tests.app.pages import Page
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm


@pytest.fixture(scope="module")
def llm() -> dkv.LoadedModel:
    return tiny_llm()


@pytest.fixture
def page(llm: dkv.LoadedModel) -> Page:
    host = ModelHost("tiny", loader=lambda name: llm)
    host.get("tiny")
    return Page(host)


def key_of_a_run(page: Page, **changes: Any) -> str:
    store = page.press_run(methods=["SnapKV", "DynamicKV"], **changes)[2]
    return str(store["key"])


@pytest.mark.parametrize("aware", [True, False])
def test_reads_are_those_of_the_engine(page: Page, llm: dkv.LoadedModel, aware: bool) -> None:
    key = key_of_a_run(page, question_aware=aware)
    sent = page.explore.evidence.reads({"key": key})["reads"]
    held = page.shelf.get(key)
    assert held is not None
    runs = held.trace.runs
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, question_aware=aware)
    kept = [run.retained.unpack(6, held.trace.prompt.length) for run in runs]
    own = dkv.reads(llm, prefill, runs[0].token_ids, kept).to_dict()
    assert sent | {"seconds": 0} == own | {"seconds": 0}
    assert (sent["tokens"], len(sent["surviving"])) == (len(runs[0].token_ids), 3)


def test_a_run_that_is_gone_or_was_opened_from_a_file_is_said(page: Page) -> None:
    reads = page.explore.evidence.reads
    for asked in ({"key": "guessed"}, {}, None, "key"):
        assert reads(asked)["error"] == "The page no longer holds this run: press Run once."
    held = page.shelf.get(key_of_a_run(page))
    assert held is not None
    opened = page.shelf.put(held.trace, "file")
    assert "read it first" in reads({"key": opened})["error"]


def test_a_busy_model_is_said_and_left_alone(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "PATIENCE", 0.01)
    key = key_of_a_run(page)
    with page.turns.join("somebody else") as ticket:
        assert ticket.wait(1)
        said = page.explore.evidence.reads({"key": key})["error"]
        assert said == "The model is busy with a run: try again when it is done."
    assert "reads" in page.explore.evidence.reads({"key": key})
    assert page.turns.counts() == {"running": 0, "waiting": 0}


def test_another_model_is_not_loaded_for_it(page: Page) -> None:
    key = key_of_a_run(page)
    held = page.shelf.get(key)
    assert held is not None
    other = page.shelf.put(held.trace, "run", "another", held.prefill)
    assert page.explore.evidence.reads({"key": other})["error"] == (
        "The model another is no longer loaded: press Run once."
    )


def test_a_run_without_full_kv_is_said(page: Page) -> None:
    held = page.shelf.get(key_of_a_run(page))
    assert held is not None
    without = replace(held.trace, runs=held.trace.runs[1:])
    key = page.shelf.put(without, "run", "tiny", held.prefill)
    assert "no answer of FullKV" in page.explore.evidence.reads({"key": key})["error"]


def test_a_what_if_is_aligned_with_full_kv_and_still_knows_what_is_expected(page: Page) -> None:
    from tests.app.explore.test_what_if import answer

    key = key_of_a_run(page, expected="Ms Okafor")
    asked = {"method": "SnapKV", "settings": {"capacity": 20, "window_size": 8}, "key": key}
    record = answer(page, asked)[2]["record"]
    assert record["runs"][-1]["aligned"]["utf16_spans"]
    assert record["runs"][-1]["expected_found"] is False
    assert record["expected"]["text"] == "Ms Okafor"
