"""VoteKV: places that the heads of all layers vote for are kept in every head."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dynamickv as dkv
from tests.engine.methods import naive
from tests.engine.methods.test_shiftkv import claim_by_hand
from tests.engine.tiny import NUM_LAYERS, random_layers, tiny_llm

LENGTH, CAPACITY, WINDOW, VOTING, SINKS = 60, 24, 8, 12, 4
SMALL = {"context_size": 20, "voting_size": VOTING, "smoothing": 3, "reach": 2}


def method(**settings: float) -> dkv.VoteKV:
    return dkv.VoteKV(capacity=CAPACITY, **{**SMALL, **settings})  # type: ignore[arg-type]


def votes_by_hand(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Per position, over all heads, the square of the most that one of the voting queries pays."""
    heads, length, size = queries.shape
    votes = np.zeros(length)
    for head in range(heads):
        most = np.zeros(length)
        for query in range(length - VOTING, length):
            logits = keys[head * len(keys) // heads, : query + 1].astype(float)
            shares = naive.softmax(logits @ queries[head, query] / math.sqrt(size))
            most[: query + 1] = np.maximum(most[: query + 1], shares)
        votes += most**2
    votes[:SINKS] = 0
    votes[length - VOTING :] = 0
    return votes


def winners_by_hand(votes: np.ndarray, count: int) -> list[int]:
    """Averaged over three positions; each counts for itself and the two behind it."""
    smooth = naive.pooled_row(votes.tolist(), 3, "avg")
    spread = [max(smooth[max(0, at - 2) : at + 1]) for at in range(LENGTH - WINDOW)]
    return naive.best(spread, count)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_every_head_keeps_the_places_that_win_by_votes_counted_by_hand(
    seed: int, share: float
) -> None:
    queries, keys = random_layers(seed, length=LENGTH)
    votes = np.zeros(LENGTH)
    for place, pair in enumerate(zip(queries, keys, strict=True)):
        query, key = (tensor[0].numpy() for tensor in pair)
        depth = 0.5 + math.sin(math.pi * place / (NUM_LAYERS - 1))
        votes += votes_by_hand(query, key) * claim_by_hand(query, key) * depth
    winners = winners_by_hand(votes, int(share * (CAPACITY - WINDOW)))
    retention = dkv.retain(method(voted_share=share), queries, keys)
    held = 0
    for kept, budget in zip(retention.indices, retention.budgets, strict=True):
        for head in kept.tolist():
            if budget - WINDOW >= len(winners):
                assert set(winners) <= set(head)
                held += 1
            else:
                assert set(head[:-WINDOW]) <= set(winners)
    assert held > 0
    assert sum(retention.budgets) == CAPACITY * NUM_LAYERS


def test_budgets_are_shiftkvs_and_without_a_share_so_is_all_that_is_kept() -> None:
    layers = random_layers(5, length=LENGTH)
    shift = dkv.retain(dkv.ShiftKV(capacity=CAPACITY, context_size=20), *layers)
    alone = dkv.retain(method(voted_share=0.0), *layers)
    voted = dkv.retain(method(), *layers)
    assert shift.budgets == alone.budgets == voted.budgets
    assert all(map(torch.equal, shift.indices, alone.indices))
    assert not all(map(torch.equal, shift.indices, voted.indices))


def test_nothing_is_dropped_before_the_last_layer_has_voted() -> None:
    layers = [
        dkv.LayerObservation(queries=query[0], keys=key[0], scaling=8**-0.5)
        for query, key in zip(*random_layers(1, length=LENGTH), strict=True)
    ]
    selection = method().begin(NUM_LAYERS, LENGTH)
    for layer in layers[:-1]:
        selection.observe(layer)
        assert selection.positions(0).shape[1] == LENGTH  # type: ignore[union-attr]
    assert list(selection.observe(layers[-1])) == list(range(NUM_LAYERS))
    assert selection.retention().budgets == dkv.retain(method(), *random_layers(1)).budgets


def test_a_prompt_of_voters_alone_is_shared_as_without_votes() -> None:
    """Nothing stands before the 64 tokens that vote, so nobody is voted for."""
    layers = random_layers(2, length=LENGTH)
    voted = dkv.retain(method(voting_size=64), *layers)
    alone = dkv.retain(method(voted_share=0.0), *layers)
    assert all(map(torch.equal, voted.indices, alone.indices))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"smoothing": 4}, "smoothing must be odd to keep positions aligned, got 4"),
        ({"voted_share": 1.5}, "voted_share must be a number from 0 to 1, got 1.5"),
        ({"voting_size": 0}, "voting_size must be"),
        ({"reach": -1}, "reach must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        method(**settings)


def test_a_hybrid_model_and_the_recalled_attention_choose_alike() -> None:
    llm = tiny_llm("gemma3")
    read = dkv.prefill(llm, "the " * 200, "Why?")
    kept = method().select(read.layers)
    assert sum(kept.budgets) == 2 * CAPACITY
    again = method().select(read.recalling)
    assert all(map(torch.equal, kept.indices, again.indices))
