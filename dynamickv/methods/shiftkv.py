"""ShiftKV: layers whose attention the end of the prompt moves get more of the budget, middle layers
before others. Ours, not from a paper; benchmarks/allocations.py measures it against SnapKV.

A layer that looks at the prompt in the same way whatever is asked (at the first tokens, at the
latest ones) loses little when it keeps little. One whose attention the last tokens pull elsewhere
is looking something up, and looking up happens between the first and the last layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.base import ScoredMethod
from dynamickv.methods.parameters import require_integer, require_positive
from dynamickv.methods.selection import ScoredSelection, Selection
from dynamickv.records import HeldLayer, LayerObservation

SINKS = 4
"""First tokens left out of the comparison: they take attention in every layer, whatever is read."""


@dataclass(frozen=True, kw_only=True)
class ShiftKV(ScoredMethod):
    """Score like SnapKV; share the budget by how far the observation window's attention lies from
    that of the tokens before it.

    A layer's claim is the total variation distance between the two attentions over the prefix, each
    summed over heads and queries and normalised, times 0.5 + sin(pi x depth), depth from 0 at the
    first layer to 1 at the last. Allocated once, after the last layer, to the last token; until
    then a layer holds up to r_max times the mean.
    """

    name: ClassVar[str] = "ShiftKV"
    context_size: int = 64
    """Trailing prompt tokens that are compared: the window, and those before it."""
    r_max: float = 10.0
    """A layer keeps at most r_max times the mean budget."""

    def __post_init__(self) -> None:
        ScoredMethod.__post_init__(self)
        require_integer("context_size", self.context_size, 1, "token")
        if self.context_size <= self.window_size:
            raise ValueError(
                f"context_size must exceed window_size={self.window_size} tokens, "
                f"got {self.context_size}"
            )
        require_positive("r_max", self.r_max)

    @property
    def tail(self) -> int:
        """The window's queries and those before them."""
        return self.context_size

    def start(self, num_layers: int) -> Selection:
        """Weigh, score, allocate, cut."""
        return ShiftSelection(self, num_layers)

    def first_budget(self, layer: int, num_layers: int, prefix_length: int) -> int:
        """r_max times the mean budget, or the whole prefix."""
        return min(int(self.r_max * self.mean_budget), prefix_length)

    def budgets_again(self, layers: Sequence[HeldLayer], scores: Sequence[Tensor]) -> list[int]:
        """By what the last queries attend to among what is held, as for a prompt."""
        most = [self.first_budget(0, len(layers), held.shape[1]) for held in scores]
        return self.shares_of([self.claim(layer) for layer in layers], most)

    def shares_of(self, distances: Sequence[float], most: int | Sequence[int]) -> list[int]:
        """Budgets of all layers, given how far the window's attention lies in each."""
        depth = max(len(distances) - 1, 1)
        claims = [
            distance * (0.5 + math.sin(math.pi * place / depth))
            for place, distance in enumerate(distances)
        ]
        return proportional_budgets(claims, self.mean_budget, most)

    def claim(self, layer: LayerObservation) -> float:
        """Total variation distance, 0 to 1; 0 for a prompt too short to compare."""
        tail = min(layer.prompt_length, self.context_size)
        if layer.queries.shape[1] < tail:
            raise ValueError(
                f"context_size={self.context_size} needs as many queries, and "
                f"{layer.queries.shape[1]} were recorded; prefill with tail={tail} or lower "
                "context_size"
            )
        window = self.window_size
        compared = layer.prompt_length - tail
        if tail <= window or compared <= SINKS:
            return 0.0
        before, now = layer.attention(tail, window), layer.attention(window)
        shares = [
            attention.sum(dim=0)[SINKS:compared] / attention[:, SINKS:compared].sum()
            for attention in (before, now)
        ]
        return float((shares[0] - shares[1]).abs().sum() / 2)


class ShiftSelection(ScoredSelection):
    """One prompt's walk through the layers; the budgets are known after the last."""

    method: ShiftKV

    def __init__(self, method: ShiftKV, num_layers: int) -> None:
        super().__init__(method, num_layers)
        self.claims: list[float] = []

    def observe(self, observation: LayerObservation) -> range:
        """Weigh and score the next layer; all layers are cut after the last."""
        self.claims.append(self.method.claim(observation))
        changed = super().observe(observation)
        if len(self.claims) < self.num_layers:
            return changed
        prefix_length = self.scores[0].shape[1]
        most = self.method.first_budget(0, self.num_layers, prefix_length)
        self.held = self.method.shares_of(self.claims, most)
        self.history.append(tuple(self.held))
        return range(self.num_layers)


def proportional_budgets(
    claims: Sequence[float], mean: int, most: int | Sequence[int]
) -> list[int]:
    """Whole budgets proportional to claims, none above `most` (of all layers, or of each), summing
    to mean x layers where `most` allows.

    What a full layer cannot take goes to the others; the largest remainders are rounded up, the
    earlier layer first.
    """
    limits = [most] * len(claims) if isinstance(most, int) else list(most)
    total = min(mean * len(claims), sum(limits))
    shares = [0.0] * len(claims)
    open_layers = list(range(len(claims)))
    room = total
    while open_layers:
        claimed = sum(claims[layer] for layer in open_layers)
        for layer in open_layers:
            part = claims[layer] / claimed if claimed > 0 else 1 / len(open_layers)
            shares[layer] = room * part
        full = [layer for layer in open_layers if shares[layer] > limits[layer]]
        if not full:
            break
        for layer in full:
            shares[layer] = float(limits[layer])
        room -= sum(limits[layer] for layer in full)
        open_layers = [layer for layer in open_layers if layer not in full]
    budgets = [int(share) for share in shares]
    remainders = sorted(range(len(claims)), key=lambda layer: budgets[layer] - shares[layer])
    for layer in remainders[: total - sum(budgets)]:
        budgets[layer] += 1
    return budgets
