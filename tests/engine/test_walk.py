"""What every method holds while a prompt is read: told as it changes, and the same in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import dynamickv as dkv
import dynamickv.walk
from tests.engine.tiny import (
    DOCUMENT,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    small_instances,
    tiny_llm,
)

PER_QUERY_HEAD = [
    method
    for method in small_instances(granularity="query_head")
    if method.name in ("SnapKV", "DynamicKV")
]


def watched(llm: dkv.LoadedModel, **settings: Any) -> Iterator[Any]:
    return dkv.compare_stream(llm, DOCUMENT, QUESTION, max_new_tokens=2, watch=True, **settings)


def last_words(events: list[Any]) -> dict[tuple[int, int], dkv.LayerKept]:
    """By run and layer, what was told last."""
    return {(event.run, event.layer): event for event in events if isinstance(event, dkv.LayerKept)}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("aware", [True, False])
def test_the_last_word_on_every_layer_is_the_record(family: str, aware: bool) -> None:
    events = list(watched(tiny_llm(family), methods=SMALL_INSTANCES, question_aware=aware))
    told, trace = last_words(events), events[-1].trace
    others = trace.model.uncompressed
    for index, run in enumerate(trace.runs):
        mask = run.retained.unpack(trace.model.num_layers, trace.prompt.length)
        for layer in range(trace.model.num_layers):
            if layer in others:
                assert (index, layer) not in told
                continue
            event = told[index, layer]
            held = event.retained.unpack(1, trace.prompt.length)
            assert np.array_equal(held[0], mask[layer])
            assert event.budget == run.budgets[layer]
        if not others:
            kept = [told[index, layer] for layer in range(NUM_LAYERS)]
            assert sum(event.kv_bytes for event in kept) == run.kv_bytes
            assert sum(event.kv_bytes_full for event in kept) == run.kv_bytes_full


@pytest.mark.parametrize("method", [*SMALL_INSTANCES, *PER_QUERY_HEAD], ids=method_name)
def test_watching_changes_nothing(method: dkv.CompressionMethod) -> None:
    llm, methods = tiny_llm(), [dkv.FullKV(), method]
    *_, last = watched(llm, methods=methods)
    plain = dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=2)
    for one, other in zip(last.trace.runs, plain.runs, strict=True):
        assert one.retained == other.retained
        assert one.budget_history == other.budget_history
        assert (one.answer, one.logprobs) == (other.answer, other.logprobs)
        assert one.kv_bytes == other.kv_bytes


def test_a_layer_is_told_before_the_next_is_read() -> None:
    events = list(watched(tiny_llm(), methods=[dkv.SnapKV(capacity=24)]))
    kinds = [type(event).__name__ for event in events]
    assert kinds[:4] == ["PromptEncoded", "Progress", "LayerKept", "Progress"]
    assert events[0].prompt == events[-1].trace.prompt
    assert events[0].model == events[-1].trace.model


def test_earlier_layers_are_told_again_when_a_budget_is_shared_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamickv.walk, "SHARE", 100.0)
    events = list(watched(tiny_llm(), methods=[dkv.DynamicKV(capacity=24, update_interval=2)]))
    told = [event for event in events if isinstance(event, dkv.LayerKept)]
    layers = [event.layer for event in told]
    assert layers == [0, 1, 0, 2, 3, 0, 1, 2, 4, 5, 0, 1, 2, 3, 4]
    first = [event.budget for event in told if event.layer == 0]
    assert first == sorted(first, reverse=True)


def test_a_method_whose_changes_take_long_to_tell_leaves_the_others_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamickv.walk, "SHARE", 100.0)
    tell = dynamickv.walk.Walks._tell_layers

    def dear(self: Any, index: int, layers: Any, told: Any) -> None:
        tell(self, index, layers, told)
        if index == 0 and index in self._again:
            self._again[0] += 1e6

    monkeypatch.setattr(dynamickv.walk.Walks, "_tell_layers", dear)
    methods = [dkv.DynamicKV(capacity=24, update_interval=2)] * 2
    told = [e for e in watched(tiny_llm(), methods=methods) if isinstance(e, dkv.LayerKept)]
    first, second = ([event.layer for event in told if event.run == run] for run in (0, 1))
    assert second == [0, 1, 0, 2, 3, 0, 1, 2, 4, 5, 0, 1, 2, 3, 4]
    assert first == [0, 1, 0, 2, 3, 4, 5, 0, 1, 2, 3, 4]


def test_what_there_is_no_time_for_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamickv.walk, "SHARE", 0.0)
    events = list(watched(tiny_llm(), methods=[dkv.SnapKV(capacity=24)]))
    layers = [event.layer for event in events if isinstance(event, dkv.LayerKept)]
    assert layers == [0, 5, 1, 2, 3, 4]


def test_nothing_is_told_unasked() -> None:
    events = dkv.compare_stream(
        tiny_llm(), DOCUMENT, QUESTION, methods=[dkv.SnapKV(capacity=24)], max_new_tokens=2
    )
    assert not any(isinstance(event, (dkv.LayerKept, dkv.PromptEncoded)) for event in events)
