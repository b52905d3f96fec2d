"""ShiftKV: budgets that follow how far the end of the prompt moves each layer's attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dynamickv as dkv
from dynamickv.methods.shiftkv import proportional_budgets
from tests.engine.methods import naive
from tests.engine.tiny import NUM_LAYERS, random_layers, tiny_llm

LENGTH, CAPACITY, WINDOW, CONTEXT, SINKS = 60, 24, 8, 20, 4


def claim_by_hand(queries: np.ndarray, keys: np.ndarray) -> float:
    """Total variation distance of what the window and the tokens before it attend to, over the
    positions between the sinks and all of them."""
    compared = slice(SINKS, LENGTH - CONTEXT)
    now = naive.attention_received(queries, keys, LENGTH - WINDOW)
    before = naive.attention_received(
        queries[:, : LENGTH - WINDOW], keys[:, : LENGTH - WINDOW], LENGTH - CONTEXT
    )
    shares = [rows.sum(axis=0)[compared] / rows[:, compared].sum() for rows in (now, before)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def budgets_by_hand(claims: list[float], mean: int, most: int) -> list[int]:
    """Share out; what does not fit in a full layer is shared out again; round by the largest
    remainders."""
    given = {}
    rest = dict(enumerate(claims))
    room = mean * len(claims)
    while True:
        shares = {layer: room * claim / sum(rest.values()) for layer, claim in rest.items()}
        full = [layer for layer, share in shares.items() if share > most]
        if not full:
            break
        for layer in full:
            given[layer] = float(most)
            del rest[layer]
        room = mean * len(claims) - most * len(given)
    given |= shares
    budgets = [math.floor(given[layer]) for layer in range(len(claims))]
    missing = mean * len(claims) - sum(budgets)
    for layer in sorted(given, key=lambda layer: (given[layer] % 1, -layer), reverse=True)[
        :missing
    ]:
        budgets[layer] += 1
    return budgets


@pytest.mark.parametrize("r_max", [1.2, 10.0])
@pytest.mark.parametrize("seed", range(6))
def test_budgets_are_those_counted_by_hand(seed: int, r_max: float) -> None:
    method = dkv.ShiftKV(capacity=CAPACITY, context_size=CONTEXT, r_max=r_max)
    queries, keys = random_layers(seed, length=LENGTH)
    claims = [
        claim_by_hand(query[0].numpy(), key[0].numpy())
        * (0.5 + math.sin(math.pi * place / (NUM_LAYERS - 1)))
        for place, (query, key) in enumerate(zip(queries, keys, strict=True))
    ]
    mean = CAPACITY - WINDOW
    expected = budgets_by_hand(claims, mean, min(int(r_max * mean), LENGTH - WINDOW))
    retention = dkv.retain(method, queries, keys)
    assert retention.budgets == [budget + WINDOW for budget in expected]
    assert [list(update) for update in retention.budget_history] == [expected]
    assert sum(retention.budgets) == CAPACITY * NUM_LAYERS
    assert len(set(expected)) > 1


def test_kept_positions_are_snapkvs_best_for_that_budget() -> None:
    method = dkv.ShiftKV(capacity=CAPACITY, context_size=CONTEXT)
    layers = random_layers(3, length=LENGTH)
    retention = dkv.retain(method, *layers)
    manual = dkv.retain(dkv.Manual(budgets=retention.budgets), *layers)
    for kept, expected in zip(retention.indices, manual.indices, strict=True):
        assert torch.equal(kept, expected)


def test_a_prompt_without_room_to_compare_is_shared_evenly() -> None:
    """26 tokens: nothing lies before the context but sinks."""
    method = dkv.ShiftKV(capacity=CAPACITY, context_size=CONTEXT + 4)
    budgets = dkv.retain(method, *random_layers(0, length=26)).budgets
    assert budgets == [CAPACITY] * NUM_LAYERS


def test_fewer_queries_than_it_compares_are_refused() -> None:
    queries, keys = random_layers(0, length=LENGTH)
    with pytest.raises(ValueError, match="context_size=20 needs as many queries, and 10 were"):
        dkv.retain(
            dkv.ShiftKV(capacity=CAPACITY, context_size=CONTEXT),
            [query[:, :, -10:] for query in queries],
            keys,
        )


def test_the_context_must_exceed_the_window() -> None:
    with pytest.raises(ValueError, match="context_size must exceed window_size=8 tokens, got 8"):
        dkv.ShiftKV(capacity=CAPACITY, context_size=8)


def test_budgets_never_exceed_the_ceiling_and_always_spend_the_total() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        claims = rng.exponential(size=int(rng.integers(1, 12))) ** 3
        mean, most = int(rng.integers(1, 50)), int(rng.integers(1, 80))
        budgets = proportional_budgets(claims.tolist(), mean, most)
        assert sum(budgets) == min(mean, most) * len(claims)
        assert max(budgets) <= most
    assert proportional_budgets([0.0, 0.0], 5, 9) == [5, 5]


def test_one_layer_and_a_hybrid_model_work() -> None:
    assert dkv.retain(dkv.ShiftKV(capacity=24), *random_layers(0, num_layers=1)).budgets == [24]
    llm = tiny_llm("gemma3")
    run = dkv.compare(
        llm, "the " * 200, "Why?", methods=[dkv.ShiftKV(capacity=24)], max_new_tokens=2
    ).runs[0]
    assert run.budgets[2] + run.budgets[5] == 48
