"""A prefill recalls the attention that choosing took: the same choice, sooner, within bounds."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

import dynamickv as dkv
from dynamickv.answer import select
from dynamickv.records import RECALLED, observation
from dynamickv.scoring import window_attention
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm


@pytest.fixture
def prefill() -> dkv.Prefill:
    return dkv.prefill(tiny_llm(), DOCUMENT, QUESTION)


@pytest.mark.parametrize(("first", "last"), [(8, 0), (64, 8), (9, 0), (37, 0), (64, 0), (40, 20)])
def test_what_is_recalled_is_what_was_computed(prefill: dkv.Prefill, first: int, last: int) -> None:
    recalling, plain = prefill.recalling[2], prefill.layers[2]
    once = recalling.attention(first, last)
    assert torch.equal(once, plain.attention(first, last))
    assert recalling.attention(first, last) is once
    assert plain.attention(first, last) is not once


def test_keys_are_compared_once_for_all_capacities(
    prefill: dkv.Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Mock(wraps=observation.unlikeness)
    monkeypatch.setattr(observation, "unlikeness", compared)
    for capacity in (40, 24, 40):
        seen = dkv.preview(dkv.KeyDiff(capacity=capacity), prefill)
        assert seen.budgets == list(select(dkv.KeyDiff(capacity=capacity), prefill).budgets)
    once = len(prefill.layers)
    assert compared.call_count == once + 3 * once, "previews compare once, fresh choices each time"


@pytest.mark.parametrize(
    ("first", "last", "asked"),
    [
        (16, 0, []),
        (64, 0, []),
        (3, 0, [3]),
        (36, 0, [4]),
        (64, 4, [4]),
        (40, 20, [4]),
        # Summed up to 48 and 16, less what one query paid and three did.
        (47, 0, [1]),
        (13, 0, [3]),
    ],
)
def test_of_a_prepared_window_only_the_queries_of_no_whole_piece_are_asked(
    prefill: dkv.Prefill,
    first: int,
    last: int,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recalling, plain = prefill.recalling[2], prefill.layers[2]
    expected = plain.attention(first, last)
    before = prefill.nbytes
    recalling.prepare()
    assert prefill.nbytes == before
    taken = Mock(wraps=observation.attention_shares)
    monkeypatch.setattr(observation, "attention_shares", taken)
    assert torch.equal(recalling.attention(first, last), expected)
    assert [call.args[0].shape[1] for call in taken.call_args_list] == asked


@pytest.mark.parametrize("window", [8, 9, 15, 24, 31, 40, 47, 57, 63])
def test_a_window_in_pieces_pays_what_it_pays_at_once(prefill: dkv.Prefill, window: int) -> None:
    layer = prefill.layers[2]
    at_once = window_attention(layer.queries[:, -window:], layer.keys, layer.scaling)
    torch.testing.assert_close(layer.attention(window), at_once, rtol=1e-5, atol=1e-7)


def test_what_is_taken_off_leaves_no_attention_below_none() -> None:
    """Else the entropy that LAVa shares the budget by is no number."""
    torch.manual_seed(0)
    layer = dkv.LayerObservation(
        queries=8 * torch.randn(6, 64, 16), keys=torch.randn(6, 3000, 16), scaling=1.0
    )
    for window in range(1, 65):
        assert not (layer.attention(window) < 0).any(), window


def test_what_is_kept_of_the_pieces_is_bounded_and_counted(prefill: dkv.Prefill) -> None:
    for window_size in range(1, 65):
        dkv.preview(dkv.SnapKV(capacity=70, window_size=window_size), prefill)
    for layer in prefill.recalling:
        assert sorted(layer.pieces) == [(end, end - 8) for end in range(8, 65, 8)]
    held = sum(
        tensor.nbytes
        for layer in prefill.recalling
        for tensor in (*layer.recalled.values(), *layer.pieces.values())
    )
    assert prefill.nbytes - prefill.kv_bytes > held


def test_a_choice_is_the_same_after_any_number_of_others(prefill: dkv.Prefill) -> None:
    methods = [
        *(dkv.DynamicKV(capacity=capacity) for capacity in (40, 24, 64)),
        dkv.SnapKV(capacity=40, window_size=16, kernel_size=3, pooling="avg"),
        dkv.PyramidKV(capacity=40, granularity="query_head"),
        dkv.ShiftKV(capacity=40),
        dkv.CAKE(capacity=40, tau1=0.5),
        dkv.KeyDiff(capacity=40),
        dkv.SnapKV(capacity=40, head_budgets="adaptive", evicted=[[3, 9]]),
    ]
    for method in (*methods, *methods):
        fresh = select(method, prefill)
        seen = dkv.preview(method, prefill)
        assert seen.budgets == list(fresh.budgets)
        for layer, heads in enumerate(fresh.indices):
            for head, kept in enumerate(heads):
                assert seen.mask[layer, head].nonzero()[0].tolist() == kept.tolist()


def test_moving_the_budget_takes_no_attention_again(prefill: dkv.Prefill) -> None:
    dkv.preview(dkv.DynamicKV(capacity=40), prefill)
    kept = [dict(layer.recalled) for layer in prefill.recalling]
    assert [len(found) for found in kept] == [1] * len(prefill.layers)
    for method in (
        dkv.DynamicKV(capacity=24, r_max=3, update_interval=2),
        dkv.SnapKV(capacity=64, kernel_size=3, pooling="avg", granularity="query_head"),
    ):
        dkv.preview(method, prefill)
    for layer, found in zip(prefill.recalling, kept, strict=True):
        assert {key: id(tensor) for key, tensor in layer.recalled.items()} == {
            key: id(tensor) for key, tensor in found.items()
        }


def test_what_is_recalled_is_bounded_and_counted(prefill: dkv.Prefill) -> None:
    before = prefill.nbytes
    for window_size in range(1, 12):
        dkv.preview(dkv.SnapKV(capacity=40, window_size=window_size), prefill)
    layers = prefill.recalling
    assert [list(layer.recalled) for layer in layers] == [[(8, 0), (9, 0), (10, 0), (11, 0)]] * 6
    recalled = sum(tensor.nbytes for layer in layers for tensor in layer.recalled.values())
    assert prefill.nbytes == before
    assert before - prefill.kv_bytes > recalled
    assert len(layers[0].recalled) == RECALLED


def test_moments_are_recalled_and_count_as_three(prefill: dkv.Prefill) -> None:
    before = prefill.nbytes
    dkv.preview(dkv.SnapKV(capacity=40), prefill)
    dkv.preview(dkv.SnapKV(capacity=40, window_size=9), prefill)
    dkv.preview(dkv.CAKE(capacity=40), prefill)
    layer = prefill.recalling[0]
    assert list(layer.recalled) == [(9, 0), (8, "moments")]
    moments = layer.recalled[8, "moments"]
    dkv.preview(dkv.CAKE(capacity=64, tau1=2.0, gamma=10.0), prefill)
    assert layer.recalled[8, "moments"] is moments
    assert sum(found.nbytes for found in layer.recalled.values()) <= (
        RECALLED * layer.num_query_heads * layer.prompt_length * 4
    )
    assert prefill.nbytes == before


@pytest.mark.parametrize("scores", [False, True])
def test_recorded_scores_are_recalled_and_the_timed_choice_is_not(
    prefill: dkv.Prefill, scores: bool
) -> None:
    method = dkv.DynamicKV(capacity=40)
    dkv.compare(tiny_llm(), prefill=prefill, methods=[method], max_new_tokens=1, scores=scores)
    recalled = [list(layer.recalled) for layer in prefill.recalling]
    assert recalled == [[(8, 0)] if scores else []] * 6
