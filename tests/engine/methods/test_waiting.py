"""DynamicKV's layers that wait for an update hold no more than they can keep at it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import dynamickv as dkv
from dynamickv.methods.dynamickv import UpdatedSelection
from dynamickv.methods.selection import ScoredSelection
from dynamickv.records import LayerObservation


class Given(dkv.DynamicKV):
    """DynamicKV with scores that a test makes up."""

    def score(self, layer: LayerObservation) -> Tensor:
        return layer.keys[..., 0]


KINDS = ["even", "heavy", "tied", "of unlike layers"]


def observation(scores: Tensor) -> LayerObservation:
    return LayerObservation(queries=scores[:, :1, None], keys=scores[..., None], scaling=1.0)


def made_up(kind: str, heads: int, length: int, chance: random.Random) -> Tensor:
    scores = torch.rand(heads, length)
    if kind == "heavy":
        scores = scores ** chance.choice([1, 8, 30])
    if kind == "tied":
        scores = (scores * 4).round()
    if kind == "of unlike layers":
        scores *= chance.choice([0.01, 1, 3])
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_is_cut_to_what_it_can_keep_and_no_budget_changes(kind: str) -> None:
    chance = random.Random(kind)
    torch.manual_seed(len(kind))
    held = saved = 0
    for _ in range(150):
        layers, heads = chance.choice([3, 5, 8, 9, 30]), chance.choice([1, 3])
        length = chance.choice([60, 300, 900])
        settings = {
            "capacity": chance.choice([9, 12, 24, 50]),
            "update_interval": chance.choice([1, 2, 3, 4, 7]),
            "r_max": chance.choice([1, 1.5, 3, 10.0]),
        }
        ours = Given(**settings).start(layers)
        assert isinstance(ours, UpdatedSelection)
        theirs = ScoredSelection(Given(**settings), layers)
        for layer in range(layers):
            seen = observation(made_up(kind, heads, length, chance))
            changed = ours.observe(seen)
            assert theirs.observe(seen) == changed
            tightened = ours.tighten()
            assert not tightened or layer in tightened
            if ours.method.updates_after(layer, layers):
                assert ours.held == theirs.held, settings
            held, saved = held + sum(theirs.held), saved + sum(theirs.held) - sum(ours.held)
            before = [a for a, b in zip(ours.held, theirs.held, strict=True) if a > b]
            assert not before, settings
        assert ours.history == theirs.history
        kept, expected = ours.retention().indices, theirs.retention().indices
        assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
    # In the mean over all layers' moments, of what the authors' code holds.
    assert saved > 0.02 * held


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_that_are_read_later_give_the_same_budgets(kind: str, progressive: bool) -> None:
    chance = random.Random(kind)
    torch.manual_seed(len(kind))
    for _ in range(60):
        layers, heads = chance.choice([3, 5, 8, 9, 30]), chance.choice([1, 3])
        length = chance.choice([60, 300, 900])
        method = Given(
            capacity=chance.choice([9, 12, 24, 50]),
            update_interval=chance.choice([1, 2, 3, 4, 7]),
            r_max=chance.choice([1, 1.5, 3, 10.0]),
            progressive=progressive,
        )
        later, at_once = method.start(layers), ScoredSelection(method, layers)
        for layer in range(layers):
            seen = observation(made_up(kind, heads, length, chance))
            assert later.observe_ahead(seen) == range(layer, layer + 1)
            changed = at_once.observe(seen)
            if chance.random() < 0.3 or layer + 1 == layers:
                caught_up = later.catch_up()
                assert not len(changed) > 1 or caught_up == changed
                assert later.catch_up() == range(0)
                assert later.held == at_once.held, method
        assert later.history == at_once.history
        kept, expected = later.retention().indices, at_once.retention().indices
        assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
