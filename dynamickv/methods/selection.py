"""One prompt's walk through the layers: what is taken in, and what each layer holds.

Layers come in order, so that the same code serves a finished prefill (all layers at once) and a
prefill that is pruned while it runs (layer by layer).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamickv.methods.edits import Spans, edited_positions
from dynamickv.records import Heads, LayerObservation, Retention
from dynamickv.scoring import share_among_heads, top_positions, top_positions_of_layers

if TYPE_CHECKING:
    from dynamickv.methods.base import ScoredMethod

HEAD_FLOOR = 0.2
"""Share of the mean budget that adaptive head budgets leave to every head (Ada-KV's safeguard)."""


class Selection(ABC):
    """One prompt's walk through the layers."""

    history: Sequence[tuple[int, ...]] = ()
    """Budgets of the layers seen so far, after each update."""

    @abstractmethod
    def observe(self, observation: LayerObservation) -> range:
        """Take in the next layer; the layers whose holdings changed."""

    def observe_ahead(self, observation: LayerObservation) -> range:
        """`observe` without waiting for the device: what would have to be waited for is left to
        `catch_up`, and until then layers hold more. What they hold after it is the same."""
        return self.observe(observation)

    def catch_up(self) -> range:
        """Do what `observe_ahead` left undone; the layers whose holdings changed."""
        return range(0)

    def tighten(self) -> range:
        """Where a cache is cut while the prompt is read: let layers hold no more than they can keep
        in the end; the layers, the last one seen among them if there are any."""
        return range(0)

    @abstractmethod
    def positions(self, layer: int) -> Heads:
        """What a layer holds now, LongTensor (heads, held) ascending, window included."""

    def positions_of(self, layers: Sequence[int]) -> list[Heads]:
        """`positions` of several layers."""
        return [self.positions(layer) for layer in layers]

    @abstractmethod
    def retention(self) -> Retention:
        """What all layers hold in the end."""


class FixedSelection(Selection):
    """Every layer keeps what a function of that layer alone says."""

    def __init__(self, choose: Callable[[LayerObservation], Heads]) -> None:
        self._choose = choose
        self._chosen: list[Heads] = []
        self._prompt_length = 0

    def observe(self, observation: LayerObservation) -> range:
        """Choose for the next layer."""
        self._chosen.append(self._choose(observation))
        self._prompt_length = observation.prompt_length
        return range(len(self._chosen) - 1, len(self._chosen))

    def positions(self, layer: int) -> Heads:
        """That layer's choice."""
        return self._chosen[layer]

    def retention(self) -> Retention:
        """All layers' choices."""
        return Retention(indices=tuple(self._chosen), prompt_length=self._prompt_length)


class RankedSelection(Selection):
    """Every layer keeps the same number of its best positions, wherever in the prompt they are."""

    def __init__(
        self,
        score: Callable[[LayerObservation], Tensor],
        count: int,
        pinned: Spans = (),
        evicted: Spans = (),
    ) -> None:
        self._score = score
        self.count = count
        self._spans = pinned, evicted
        self.scores: list[Tensor] = []

    def observe(self, observation: LayerObservation) -> range:
        """Score the next layer."""
        self.scores.append(self._score(observation))
        return range(len(self.scores) - 1, len(self.scores))

    def positions(self, layer: int) -> Heads:
        """That layer's best."""
        return self.positions_of([layer])[0]

    def positions_of(self, layers: Sequence[int]) -> list[Heads]:
        """Several layers' best."""
        scores = [self.scores[layer] for layer in layers]
        if any(self._spans):
            return [edited_positions(layer, self.count, *self._spans) for layer in scores]
        return list(top_positions_of_layers(scores, [self.count] * len(scores)))

    def retention(self) -> Retention:
        """All layers' best."""
        return Retention(
            indices=tuple(self.positions_of(range(len(self.scores)))),
            prompt_length=self.scores[0].shape[1],
        )


class ScoredSelection(Selection):
    """One prompt's walk through the layers: scores so far, and how many prefix tokens each layer
    still holds.

    A cut is permanent: a budget that grows again later does not bring tokens back.
    """

    def __init__(self, method: ScoredMethod, num_layers: int) -> None:
        self.method = method
        self.num_layers = num_layers
        self.scores: list[Tensor] = []
        self.held: list[int] = []
        self.history: list[tuple[int, ...]] = []

    def observe(self, observation: LayerObservation) -> range:
        """Score the next layer, re-allocate if its turn has come; the layers whose holdings
        changed."""
        layer = len(self.scores)
        scores = self.method.score(observation)
        self.scores.append(scores)
        first = self.method.first_budget(layer, self.num_layers, scores.shape[1])
        self.held.append(min(first, scores.shape[1]))
        if not self.method.updates_after(layer, self.num_layers):
            return range(layer, layer + 1)
        budgets = self.method.allocate(self.scores, self.num_layers)
        self.history.append(tuple(budgets))
        self.held = [min(held, budget) for held, budget in zip(self.held, budgets, strict=True)]
        return range(layer + 1)

    def tighten(self) -> range:
        """As `Selection` does, by what the method says."""
        seen = len(self.scores)
        if self.method.updates_after(seen - 1, self.num_layers):
            return range(0)
        most = self.method.most_later(self.scores, self.num_layers)
        waiting = range(seen - len(most), seen)
        for layer, budget in zip(waiting, most, strict=True):
            self.held[layer] = min(self.held[layer], budget)
        return waiting

    def positions(self, layer: int) -> Heads:
        """What a layer holds now, (heads, held + window) ascending."""
        return self.positions_of([layer])[0]

    def positions_of(self, layers: Sequence[int]) -> list[Heads]:
        """What several layers hold now."""
        scores = [self.scores[layer] for layer in layers]
        budgets = [self.held[layer] for layer in layers]
        if self.method.edited:
            return [
                self._edited(layer, budget) for layer, budget in zip(scores, budgets, strict=True)
            ]
        if self.method.head_budgets == "adaptive":
            prefix_length = scores[0].shape[1]
            window = torch.arange(
                prefix_length, prefix_length + self.method.window_size, device=scores[0].device
            )
            return [
                tuple(
                    torch.cat([top_positions(head[None], count)[0], window.to(head.device)])
                    for head, count in zip(
                        layer, share_among_heads(layer, budget, self.method.head_floor), strict=True
                    )
                )
                for layer, budget in zip(scores, budgets, strict=True)
            ]
        return list(top_positions_of_layers(scores, budgets, self.method.window_size))

    def _edited(self, scores: Tensor, budget: int) -> Heads:
        """One layer's positions where a person pinned or evicted some."""
        window = self.method.window_size
        always = scores.new_full((scores.shape[0], window), math.inf)
        count: int | list[int] = budget + window
        if self.method.head_budgets == "adaptive":
            shares = share_among_heads(scores, budget, self.method.head_floor)
            count = [number + window for number in shares]
        whole = torch.cat([scores, always], dim=1)
        return edited_positions(whole, count, self.method.pinned, self.method.evicted)

    def retention(self) -> Retention:
        """What all layers hold in the end."""
        return Retention(
            indices=tuple(self.positions_of(range(len(self.scores)))),
            prompt_length=self.scores[0].shape[1] + self.method.window_size,
            budget_history=tuple(self.history),
        )
