"""Scores and selections equal plain restatements of spec and papers, on random and awkward
inputs."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import dynamickv as dkv
from dynamickv import scoring
from tests.engine.methods import naive
from tests.engine.tiny import random_layers


@pytest.mark.parametrize("window", [1, 3, 12])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_window_attention_equals_a_loop(window: int, query_heads: int, kv_heads: int) -> None:
    queries, keys = random_layers(window, 1, query_heads, kv_heads, length=30)
    ours = scoring.window_attention(queries[0][0, :, -window:], keys[0][0], 8**-0.5)
    expected = naive.attention_received(queries[0][0].numpy(), keys[0][0].numpy(), 30 - window)
    np.testing.assert_allclose(ours, expected[:, :-window], rtol=1e-4, atol=1e-7)


def test_the_window_takes_its_share_of_the_attention() -> None:
    queries, keys = random_layers(0, 1, length=20)
    received = scoring.window_attention(queries[0][0, :, -5:], keys[0][0], 8**-0.5)
    assert (received.sum(dim=1) < 5).all()


@pytest.mark.skipif(not hasattr(scoring, "attention_mass"), reason="no method needs it")
@pytest.mark.parametrize("length", [1, 2, 40, 700])
def test_attention_mass_equals_a_loop_in_every_block_size(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BLOCK_ELEMENTS", (1, 1), raising=False)
    queries, keys = random_layers(0, 1, 4, 2, length=length)
    ours = scoring.attention_mass(queries[0][0], keys[0][0], 8**-0.5)
    monkeypatch.undo()
    whole = scoring.attention_mass(queries[0][0], keys[0][0], 8**-0.5)
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
    expected = naive.attention_received(queries[0][0].numpy(), keys[0][0].numpy())
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 41])
@pytest.mark.parametrize("length", [1, 2, 20])
def test_pooling_equals_a_loop_at_the_edges_too(
    pooling: str, kernel_size: int, length: int
) -> None:
    scores = torch.rand(3, length, generator=torch.Generator().manual_seed(0))
    expected = [naive.pooled_row(row, kernel_size, pooling) for row in scores.tolist()]
    ours = scoring.pool(scores, kernel_size, pooling)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("kernel_size", [41, 2**40 + 1])
def test_pooling_wider_than_the_prompt_gives_all_positions_the_same(kernel_size: int) -> None:
    scores = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    total = scores.sum(dim=1, keepdim=True).expand(3, 20)
    torch.testing.assert_close(scoring.pool(scores, kernel_size, "avg"), total / kernel_size)
    most = scores.amax(dim=1, keepdim=True).expand(3, 20)
    assert torch.equal(scoring.pool(scores, kernel_size, "max"), most)


@pytest.mark.parametrize("reduction", ["mean", "max", "sum"])
def test_query_heads_are_joined_within_their_own_group(reduction: str) -> None:
    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    ours = scoring.reduce_group(scores, 2, reduction)
    join = {"mean": np.mean, "max": np.max, "sum": np.sum}[reduction]
    np.testing.assert_allclose(ours[0], join(scores[:3].numpy(), axis=0), rtol=1e-6)
    np.testing.assert_allclose(ours[1], join(scores[3:].numpy(), axis=0), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_top_positions_equal_a_sort_with_many_ties(seed: int) -> None:
    rows = [[random.Random(seed + head).randrange(4) for _ in range(30)] for head in range(3)]
    scores = torch.tensor(rows, dtype=torch.float32)
    for count in (0, 1, 7, 29, 30, 99):
        ours = scoring.top_positions(scores, count).tolist()
        assert ours == [naive.best(row, count) for row in rows]


def test_a_smaller_choice_is_always_part_of_a_larger_one() -> None:
    scores = torch.tensor([[1.0, 1, 1, 0, 1, 1, 2, 2, 1, 1]])
    chosen = [set(scoring.top_positions(scores, count)[0].tolist()) for count in range(11)]
    assert all(small < large for small, large in pairwise(chosen))


@pytest.mark.parametrize("seed", range(5))
def test_global_counts_equal_a_sort_with_ties_across_layers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 5, (2, 10), generator=generator).float() for _ in range(4)]
    ranked = sorted(
        (-score, layer) for layer, table in enumerate(scores) for score in table.flatten().tolist()
    )
    for count in (0, 1, 13, 79, 80, 200):
        expected = [[layer for _, layer in ranked[:count]].count(index) for index in range(4)]
        if count == 0:
            continue
        assert scoring.count_global_top(scores, count) == expected


@pytest.mark.parametrize("sampled", ["like the rest", "the best", "the worst", "all equal"])
def test_global_counts_equal_a_sort_whatever_a_sample_suggests(sampled: str) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = [torch.randint(1, 900, (2, 1500), generator=generator).float() for _ in range(3)]
    if sampled != "like the rest":
        value = {"the best": 1000.0, "the worst": 0.0, "all equal": 450.0}[sampled]
        flat = torch.stack(scores).flatten()
        flat[:: scoring._SAMPLED] = value
        scores = list(flat.view(3, 2, 1500))
    ranked = torch.stack(scores).flatten().sort(descending=True, stable=True).indices // 3000
    for count in (1, 20, 141, 300, 4000, 8999):
        expected = ranked[:count].bincount(minlength=3).tolist()
        assert scoring.count_global_top(scores, count) == expected


SHAPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_layers": 6}, {}),
    ({"num_layers": 6}, {"update_interval": 1}),
    ({"num_layers": 6}, {"update_interval": 3}),
    ({"num_layers": 6}, {"update_interval": 7}),
    ({"num_layers": 7}, {"update_interval": 3, "pooling": "avg", "kernel_size": 3}),
    ({"num_layers": 10}, {"granularity": "query_head"}),
    ({"num_layers": 4, "length": 90}, {"r_max": 1.0}),
    ({"num_layers": 9, "length": 90}, {"r_max": 1.3, "update_interval": 2}),
    ({"num_layers": 30, "length": 26}, {"r_max": 1.0}),
    ({"num_layers": 1}, {}),
    ({"num_layers": 5, "query_heads": 4, "kv_heads": 4}, {"capacity": 9}),
    ({"num_layers": 5, "length": 25}, {"group_reduction": "max"}),
    ({"num_layers": 12, "length": 70}, {"capacity": 60, "group_reduction": "sum"}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("shape", "settings"), SHAPES)
def test_dynamickv_equals_an_independent_restatement(
    shape: dict[str, Any], settings: dict[str, Any], seed: int
) -> None:
    method = dkv.DynamicKV(**{"capacity": 24, **settings})
    queries, keys = random_layers(seed, **shape)
    scores = [
        naive.window_scores(query[0].numpy(), key[0].numpy(), method)
        for query, key in zip(queries, keys, strict=True)
    ]
    kept, history = naive.dynamickv(scores, method)
    ours = dkv.retain(method, queries, keys)
    assert [list(update) for update in ours.budget_history] == history
    prefix = keys[0].shape[2] - method.window_size
    for layer, positions in enumerate(ours.indices):
        assert [row[: len(row) - 8] for row in positions.tolist()] == kept[layer]
        assert all(row[-8:] == list(range(prefix, prefix + 8)) for row in positions.tolist())


def test_the_restatement_sees_budgets_that_differ_shrink_and_grow() -> None:
    """Otherwise the comparison above would prove little."""
    method = dkv.DynamicKV(capacity=24, update_interval=1, r_max=1.3)
    history = dkv.retain(method, *random_layers(0, num_layers=9, length=90)).budget_history
    assert len(set(history[-1])) > 2
    first_layer = [update[0] for update in history]
    steps = [after - before for before, after in pairwise(first_layer)]
    assert min(steps) < 0


@pytest.mark.parametrize("update_interval", [1, 3, 4, 7])
def test_budgets_of_every_update_sum_to_the_whole_models_prefix_budget(
    update_interval: int,
) -> None:
    method = dkv.DynamicKV(capacity=24, update_interval=update_interval)
    for update in dkv.retain(method, *random_layers(5)).budget_history:
        assert sum(update) == (24 - 8) * 6
        assert min(update) >= 0


@pytest.mark.parametrize("behind", [0, 3])
def test_layers_cut_at_once_equal_layers_cut_one_by_one(behind: int) -> None:
    """Ties, nothing, everything and more than there is."""
    generator = torch.Generator().manual_seed(3)
    counts = [0, 1, 7, 19, 40, 41, 13]
    scores = [torch.randint(0, 6, (2, 40), generator=generator).float() for _ in range(len(counts))]
    at_once = scoring.top_positions_at_once(scores, counts, behind)
    one_by_one = scoring.top_positions_of_layers(scores, counts, behind)
    last = torch.arange(40, 40 + behind).expand(2, -1)
    for layer, count, *kept in zip(scores, counts, at_once, one_by_one, strict=True):
        expected = torch.cat([scoring.top_positions(layer, count), last], dim=1)
        assert all(torch.equal(positions, expected) for positions in kept)
