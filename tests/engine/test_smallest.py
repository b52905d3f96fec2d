"""The smallest capacity that still answers: what a bisection tries, finds and refuses."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

import dynamickv as dkv
from dynamickv import smallest as smallest_module
from dynamickv.smallest import capacities, with_capacity
from tests.engine.tiny import DOCUMENT, QUESTION

METHOD = dkv.SnapKV(capacity=32, window_size=8)


def answering_from(monkeypatch: pytest.MonkeyPatch, least: int, fact: str = "gate") -> list[int]:
    """Let methods answer at this capacity and above; the capacities tried."""
    tried: list[int] = []
    real = smallest_module._answered

    def pretend(llm: Any, prefill: Any, method: Any, *rest: Any) -> Any:
        tried.append(method.capacity)
        run = real(llm, prefill, method, *rest)
        assert run is not None
        return replace(run, answer=f"the {fact}" if method.capacity >= least else "nothing")

    monkeypatch.setattr(smallest_module, "_answered", pretend)
    return tried


@pytest.fixture
def full(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> dkv.Run:
    run = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=4).runs[0]
    return replace(run, answer="by the gate")


@pytest.mark.parametrize("least", [16, 72, 120, 10_000])
def test_a_bisection_finds_the_edge_and_has_tried_both_sides_of_it(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, full: dkv.Run, monkeypatch: Any, least: int
) -> None:
    tried = answering_from(monkeypatch, least)
    found = dkv.smallest_capacity(
        llm, prefill, METHOD, expected=["gate"], full=full, max_new_tokens=2
    )
    assert found is not None
    sizes = capacities(METHOD, prefill.length)
    assert found.capacity == min(least, prefill.length)
    below = sizes[sizes.index(found.capacity) - 1] if found.capacity != sizes[0] else None
    assert below is None or below in tried
    assert len(tried) <= len(sizes).bit_length()
    assert found.whole == (least > prefill.length)
    assert [probe.capacity for probe in found.probes] == tried
    assert found.by == "facts"


def test_without_facts_a_method_answers_while_no_word_of_fullkvs_is_lost(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    found = dkv.smallest_capacity(llm, prefill, METHOD, max_new_tokens=12)
    assert found is not None
    assert found.by == "words"
    losses = {}
    for probe in found.probes:
        methods = [dkv.FullKV(), with_capacity(METHOD, probe.capacity)]
        trace = dkv.compare(llm, prefill=prefill, methods=methods, max_new_tokens=12)
        aligned = trace.runs[1].aligned
        assert aligned is not None
        losses[probe.capacity] = aligned.loss is None
    assert losses == {probe.capacity: probe.answers for probe in found.probes}


def test_nothing_is_read_again_and_the_size_is_what_a_run_holds(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, full: dkv.Run, monkeypatch: Any
) -> None:
    answering_from(monkeypatch, 40)
    monkeypatch.setattr(import_module("dynamickv.compare"), "prefill_prompt", None)
    found = dkv.smallest_capacity(
        llm, prefill, METHOD, expected=["gate"], full=full, max_new_tokens=2
    )
    assert found is not None
    methods = [with_capacity(METHOD, found.capacity)]
    run = dkv.compare(llm, prefill=prefill, methods=methods, max_new_tokens=1).runs[0]
    assert (found.kv_bytes, found.kept_fraction) == (run.kv_bytes, run.kept_fraction)


def test_a_document_read_alone_takes_any_question(llm: dkv.LoadedModel) -> None:
    alone = dkv.prefill(llm, DOCUMENT)
    found = dkv.smallest_capacity(llm, alone, METHOD, question=QUESTION, max_new_tokens=4)
    assert found is not None
    assert found.capacity in capacities(METHOD, alone.length)


def test_every_capacity_is_told_and_a_stop_ends_the_search(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    told: list[dkv.Probe] = []
    found = dkv.smallest_capacity(
        llm, prefill, METHOD, max_new_tokens=4,
        on_probe=told.append, should_stop=lambda: len(told) == 2,
    )  # fmt: skip
    assert found is None
    assert len(told) == 2
    assert told[0].left > told[1].left > 0


def test_capacities_that_a_method_does_not_take_are_not_tried() -> None:
    assert capacities(dkv.SnapKV(capacity=64, window_size=16), 50) == [24, 32, 40, 48, 50]
    assert capacities(dkv.StreamingLLM(capacity=64), 20, 4) == [8, 12, 16, 20]


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        (dkv.FullKV(), {}, "has no capacity to search"),
        (METHOD, {"expected": ["no such words"]}, "FullKV's own answer lacks 'no such words'"),
        (METHOD, {"step": 0}, "step must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_sentence(
    llm: dkv.LoadedModel,
    prefill: dkv.Prefill,
    method: dkv.CompressionMethod,
    more: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(ValueError, match=words):
        dkv.smallest_capacity(llm, prefill, method, max_new_tokens=2, **more)


def test_a_method_that_reads_all_attention_is_refused_where_none_was_recorded(
    llm: dkv.LoadedModel,
) -> None:
    read = dkv.prefill(llm, DOCUMENT, QUESTION)
    with pytest.raises(ValueError, match="mass=True"):
        dkv.smallest_capacity(llm, read, dkv.H2O(capacity=32), max_new_tokens=2)
