"""Pinned and evicted spans: obeyed by every method, at the same number of tokens, and the rest is
still the method's own choice.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import dynamickv as dkv
from tests.engine.tiny import (
    COMPRESSING,
    NUM_LAYERS,
    method_name,
    random_layers,
    retain,
    tiny_llm,
)

from tests.engine.tiny import DOCUMENT, QUESTION  # isort: skip

LENGTH = 60
QUERIES, KEYS = random_layers(seed=1, length=LENGTH)
PINNED = [[11, 14], [40, 41]]
EVICTED = [[0, 3], [20, 30]]
every_method = pytest.mark.parametrize("method", COMPRESSING, ids=method_name)


def held(retention: Any, layer: int, head: int) -> list[int]:
    positions: list[int] = retention.indices[layer][head].tolist()
    return positions


def positions(spans: list[list[int]]) -> set[int]:
    return {place for first, last in spans for place in range(first, last)}


@every_method
def test_every_layer_and_head_obeys_at_the_same_number_of_tokens(method: Any) -> None:
    edited = dataclasses.replace(method, pinned=PINNED, evicted=EVICTED)
    before, after = retain(method, QUERIES, KEYS), retain(edited, QUERIES, KEYS)
    always = positions(PINNED) | set(range(LENGTH - getattr(method, "window_size", 0), LENGTH))
    for layer in range(NUM_LAYERS):
        for head in range(len(before.indices[layer])):
            kept = held(after, layer, head)
            assert kept == sorted(set(kept))
            assert positions(PINNED) <= set(kept)
            assert not positions(EVICTED) & set(kept)
            places = len(held(before, layer, head))
            assert len(kept) == max(places, len(always))


@every_method
def test_what_is_free_is_the_methods_own_choice(method: Any) -> None:
    """The unmarked tokens that stay with fewer places were kept before; none is a new pick."""
    pinned = dataclasses.replace(method, pinned=PINNED)
    before, after = retain(method, QUERIES, KEYS), retain(pinned, QUERIES, KEYS)
    for layer in range(NUM_LAYERS):
        for head in range(len(before.indices[layer])):
            fresh = set(held(after, layer, head)) - set(held(before, layer, head))
            assert fresh <= positions(PINNED)
    assert before.budget_history == after.budget_history


def test_a_pin_pushes_out_the_worst_and_an_eviction_lets_in_the_next_best() -> None:
    method = dkv.SnapKV(capacity=24, window_size=8, kernel_size=1)
    plain = retain(method, QUERIES, KEYS)
    larger = retain(dataclasses.replace(method, capacity=25), QUERIES, KEYS)
    for head in range(2):
        kept, more = held(plain, 0, head), held(larger, 0, head)
        (next_best,) = set(more) - set(kept)
        fewer = held(retain(dataclasses.replace(method, capacity=23), QUERIES, KEYS), 0, head)
        (worst,) = set(kept) - set(fewer)
        pinned = dataclasses.replace(method, pinned=[[next_best, next_best + 1]])
        expected = sorted({*kept, next_best} - {worst})
        assert held(retain(pinned, QUERIES, KEYS), 0, head) == expected
        best = next(place for place in kept if place != worst)
        evicted = dataclasses.replace(method, evicted=[[best, best + 1]])
        expected = sorted({*kept, next_best} - {best})
        assert held(retain(evicted, QUERIES, KEYS), 0, head) == expected


@every_method
def test_evicting_reaches_into_the_window_and_a_prompt_that_fits(method: Any) -> None:
    end = [[LENGTH - 2, LENGTH]]
    kept = retain(dataclasses.replace(method, evicted=end), QUERIES, KEYS)
    assert max(held(kept, 3, 0)) < LENGTH - 2
    if method.name != "KeyDiff":  # the last tokens have no privilege there
        assert max(held(kept, 3, 0)) == LENGTH - 3
    roomy = {"capacity": 500} | ({"budgets": [500] * NUM_LAYERS} if method.name == "Manual" else {})
    fits = dataclasses.replace(method, evicted=EVICTED, **roomy)
    whole = retain(fits, QUERIES, KEYS)
    assert held(whole, 0, 1) == [p for p in range(LENGTH) if p not in positions(EVICTED)]


@pytest.mark.parametrize("head_budgets", ["uniform", "adaptive"])
def test_adaptive_heads_obey_too(head_budgets: str) -> None:
    method = dkv.DynamicKV(capacity=24, head_budgets=head_budgets, pinned=PINNED, evicted=EVICTED)
    retention = retain(method, QUERIES, KEYS)
    for kept in retention.indices:
        for head in kept:
            assert positions(PINNED) <= set(head.tolist())
            assert not positions(EVICTED) & set(head.tolist())


@pytest.mark.parametrize(
    ("spans", "sentence"),
    [
        ({"pinned": [[0, 5]], "evicted": [[4, 9]]}, r"pinned \[0, 5\) and evicted \[4, 9\) over"),
        ({"pinned": [[50, 61]]}, "ends at position 61 .* has 60 tokens"),
        ({"evicted": [[0, 60]]}, "cover all 60 tokens"),
    ],
)
def test_what_cannot_be_is_one_sentence(spans: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        retain(dkv.SnapKV(capacity=24, **spans), QUERIES, KEYS)


@every_method
def test_spans_travel_in_the_parameters(method: Any) -> None:
    edited = dataclasses.replace(method, pinned=PINNED)
    assert edited.parameters["pinned"] == PINNED
    assert "evicted" not in edited.parameters
    assert "pinned" not in method.parameters
    assert dkv.build_method(method.name, **json.loads(json.dumps(edited.parameters))) == edited


@pytest.mark.parametrize("capacity", [24, 5000])
@pytest.mark.parametrize("kind", [dkv.SnapKV, dkv.DynamicKV, dkv.StreamingLLM])
def test_pruning_while_reading_keeps_the_same(kind: Any, capacity: int) -> None:
    llm = tiny_llm()
    method = kind(capacity=capacity, pinned=PINNED, evicted=EVICTED)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    expected = method.select(prefill.layers)
    ids = torch.tensor([prefill.prompt.token_ids])
    with dkv.compress(llm.model, method) as cache, torch.no_grad():
        llm.model(ids, past_key_values=cache)
    assert cache.nbytes == dkv.preview(method, prefill).kv_bytes
    for ours, theirs in zip(cache.retention().indices, expected.indices, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_the_record_and_the_preview_say_what_was_marked() -> None:
    llm = tiny_llm()
    method = dkv.DynamicKV(capacity=40, pinned=[[60, 66]], evicted=[[8, 12]])
    trace = dkv.compare(
        llm, DOCUMENT, QUESTION, methods=[dkv.FullKV(), method], max_new_tokens=3, scores=True
    )
    again = dkv.Trace.from_dict(json.loads(json.dumps(trace.to_dict())))
    assert again == trace
    run = again.run("DynamicKV")
    assert run.parameters["pinned"] == [[60, 66]]
    mask = run.retained.unpack(NUM_LAYERS, trace.prompt.length)
    assert mask[:, :, 60:66].all()
    assert not mask[:, :, 8:12].any()
    shown = dkv.preview(method, dkv.prefill(llm, DOCUMENT, QUESTION))
    assert (shown.mask == mask).all()
    assert shown.kv_bytes == run.kv_bytes
