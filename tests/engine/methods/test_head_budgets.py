"""Budgets beyond the paper: heads that compete for a layer's budget, and one exact allocation over
all layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dynamickv as dkv
from dynamickv.cache import HeadwiseLayer, prune
from dynamickv.scoring import share_among_heads
from tests.engine.methods import naive
from tests.engine.tiny import NUM_LAYERS, random_layers

LENGTH, CAPACITY, WINDOW = 60, 24, 8
PREFIX = LENGTH - WINDOW


def scores_of(method: dkv.ScoredMethod, seed: int) -> list[list[list[float]]]:
    queries, keys = random_layers(seed, length=LENGTH)
    return [
        naive.window_scores(query[0].numpy(), key[0].numpy(), method)
        for query, key in zip(queries, keys, strict=True)
    ]


def share_by_hand(rows: list[list[float]], budget: int) -> list[int]:
    """A fifth of the budget for every head, then the best of all heads' remaining scores."""
    floor = int(0.2 * budget)
    rest = sorted(
        (-score, head)
        for head, row in enumerate(rows)
        for score in sorted(row, reverse=True)[floor:]
    )
    counts = [floor] * len(rows)
    for _, head in rest[: (budget - floor) * len(rows)]:
        counts[head] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [1, 2, 4, 5, 16, 40, PREFIX - 1, PREFIX])
def test_heads_share_a_layers_budget_as_counted_by_hand(seed: int, budget: int) -> None:
    rows = scores_of(dkv.SnapKV(capacity=CAPACITY), seed)[seed % NUM_LAYERS]
    counts = share_among_heads(torch.tensor(rows), budget, 0.2)
    assert counts == share_by_hand(rows, budget)
    assert sum(counts) == budget * len(rows)


@pytest.mark.parametrize("seed", range(4))
def test_a_smaller_budget_takes_from_heads_and_never_gives(seed: int) -> None:
    """So that cutting in steps, as serve mode does, ends where one cut does."""
    scores = torch.rand(4, 50, generator=torch.Generator().manual_seed(seed)) ** 4
    before = [50] * 4
    for budget in range(50, 0, -1):
        now = share_among_heads(scores, budget, 0.2)
        assert all(fewer <= more for fewer, more in zip(now, before, strict=True)), budget
        before = now


def test_heads_of_equal_scores_share_equally() -> None:
    assert share_among_heads(torch.ones(3, 40), 10, 1.0) == [10, 10, 10]
    assert sum(share_among_heads(torch.ones(3, 40), 10, 0.2)) == 30


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_every_head_keeps_its_best_positions_and_the_window(granularity: str) -> None:
    method = dkv.SnapKV(capacity=CAPACITY, head_budgets="adaptive", granularity=granularity)
    retention = dkv.retain(method, *random_layers(1, length=LENGTH))
    for kept, rows in zip(retention.indices, scores_of(method, 1), strict=True):
        counts = share_by_hand(rows, CAPACITY - WINDOW)
        expected = [
            [*naive.best(row, count), *range(PREFIX, LENGTH)]
            for row, count in zip(rows, counts, strict=True)
        ]
        assert [head.tolist() for head in kept] == expected
    assert retention.budgets == [CAPACITY] * NUM_LAYERS
    assert retention.kept_fraction == CAPACITY / LENGTH
    assert any(len({len(head) for head in kept}) > 1 for kept in retention.indices)


def test_adaptive_heads_hold_the_same_bytes_in_separate_heads(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    adaptive = dkv.SnapKV(capacity=CAPACITY, head_budgets="adaptive")
    trace = dkv.compare(
        llm, prefill=prefill, methods=[dkv.SnapKV(capacity=CAPACITY), adaptive], max_new_tokens=4
    )
    assert trace.runs[0].kv_bytes == trace.runs[1].kv_bytes
    assert trace.runs[0].retained != trace.runs[1].retained
    cache = prune(prefill, adaptive.select(prefill.layers), room=4)
    assert all(isinstance(layer, HeadwiseLayer) for layer in cache.layers)
    assert cache.nbytes == trace.runs[1].kv_bytes
    assert not cache.plain


def exact_by_hand(scores: list[list[list[float]]], mean: int, most: int) -> list[int]:
    """Hand out one (head, position) after the other to the layer with the best score left that is
    not full, then round to whole tokens per head."""
    heads = len(scores[0])
    ranked = sorted(
        ((score, layer) for layer, rows in enumerate(scores) for row in rows for score in row),
        key=lambda pair: (-pair[0], pair[1]),
    )
    counts = [0] * len(scores)
    spent = 0
    for _, layer in ranked:
        if spent == mean * len(scores) * heads:
            break
        if counts[layer] < most * heads:
            counts[layer] += 1
            spent += 1
    whole = [count // heads for count in counts]
    order = sorted(range(len(scores)), key=lambda layer: -(counts[layer] % heads))
    for layer in order[: mean * len(scores) - sum(whole)]:
        whole[layer] += 1
    return whole


@pytest.mark.parametrize("r_max", [1.2, 2.0, 10.0])
@pytest.mark.parametrize("seed", range(6))
def test_one_exact_allocation_spends_the_budget_to_the_last_token(seed: int, r_max: float) -> None:
    method = dkv.DynamicKV(capacity=CAPACITY, progressive=False, r_max=r_max)
    retention = dkv.retain(method, *random_layers(seed, length=LENGTH))
    mean = CAPACITY - WINDOW
    expected = exact_by_hand(scores_of(method, seed), mean, min(int(r_max * mean), PREFIX))
    assert sum(retention.budgets) == CAPACITY * NUM_LAYERS
    assert retention.budgets == [prefix + WINDOW for prefix in expected]
    assert [list(update) for update in retention.budget_history] == [expected]
    assert len(set(expected)) > 1


def test_the_exact_allocation_differs_from_the_papers() -> None:
    layers = random_layers(0, length=LENGTH)
    progressive, exact = (
        dkv.retain(dkv.DynamicKV(capacity=CAPACITY, progressive=progressive), *layers).budgets
        for progressive in (True, False)
    )
    assert progressive != exact


def test_both_together_keep_exactly_capacity_times_heads() -> None:
    method = dkv.DynamicKV(capacity=CAPACITY, progressive=False, head_budgets="adaptive")
    retention = dkv.retain(method, *random_layers(2, length=LENGTH))
    held = np.array([[len(head) for head in kept] for kept in retention.indices])
    assert held.sum() == CAPACITY * NUM_LAYERS * held.shape[1]
