"""ShiftKV: layers whose attention the end of the prompt moves get more of the budget, middle layers
before others. Ours, not from a paper; benchmarks/allocations.py measures it against SnapKV.

A layer that looks at the prompt in the same way whatever is asked (at the first tokens, at the
latest ones) loses little when it keeps little. One whose attention the last tokens pull elsewhere
is looking something up, and looking up happens between the first and the last layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.base import ScoredMethod
from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.claims import ClaimingMethod, shares_of
from dynamickv.methods.parameters import require_integer, require_positive
from dynamickv.records import HeldLayer, LayerObservation

SINKS = 4
"""First tokens left out of the comparison: they take attention in every layer, whatever is read."""


@dataclass(frozen=True, kw_only=True)
class ShiftKV(ClaimingMethod):
    """Score like SnapKV; share the budget by how far the observation window's attention lies from
    that of the tokens before it.

    A layer's claim is the total variation distance between the two attentions over the prefix, each
    summed over heads and queries and normalised, times 0.5 + sin(pi x depth), depth from 0 at the
    first layer to 1 at the last. Allocated once, after the last layer, to the last token; until
    then a layer holds up to r_max times the mean.
    """

    name: ClassVar[str] = "ShiftKV"
    capabilities: ClassVar[Capabilities] = replace(ClaimingMethod.capabilities, decoding=True)
    context_size: int = 64
    """Trailing prompt tokens that are compared: the window, and those before it."""
    r_max: float = 10.0
    """A layer keeps at most r_max times the mean budget."""

    def __post_init__(self) -> None:
        ClaimingMethod.__post_init__(self)
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

    def first_budget(self, layer: int, num_layers: int, prefix_length: int) -> int:
        """r_max times the mean budget, or the whole prefix."""
        return int(min(self.r_max * self.mean_budget, prefix_length))

    def weigh(self, layer: LayerObservation) -> tuple[Tensor, float]:
        """Scores, and the layer's claim."""
        return self.score(layer), self.claim(layer)

    def score(self, layer: LayerObservation) -> Tensor:
        """As `ScoredMethod` does."""
        return ScoredMethod.score(self, layer)

    def budgets_of(self, claims: Sequence[float], num_layers: int, prefix_length: int) -> list[int]:
        """`first_budget`, and once all layers are seen their shares."""
        most = self.first_budget(0, num_layers, prefix_length)
        if len(claims) < num_layers:
            return [most] * len(claims)
        return self._by_depth(claims, most)

    def budgets_again(self, layers: Sequence[HeldLayer], scores: Sequence[Tensor]) -> list[int]:
        """By what the last queries attend to among what is held, as for a prompt."""
        most = [self.first_budget(0, len(layers), held.shape[1]) for held in scores]
        return self._by_depth([self.claim(layer) for layer in layers], most)

    def _by_depth(self, claims: Sequence[float], most: int | Sequence[int]) -> list[int]:
        """Budgets of all layers; the middle ones' claims count for more."""
        weighed = [
            claim * weight_of_depth(place, len(claims)) for place, claim in enumerate(claims)
        ]
        return proportional_budgets(weighed, self.mean_budget, most)

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


def weight_of_depth(place: int, num_layers: int) -> float:
    """From 0.5 at the first and the last layer to 1.5 in the middle."""
    return 0.5 + math.sin(math.pi * place / max(num_layers - 1, 1))


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
    shares = shares_of(claims, total, limits)
    budgets = [int(share) for share in shares]
    remainders = sorted(range(len(claims)), key=lambda layer: budgets[layer] - shares[layer])
    for layer in remainders[: total - sum(budgets)]:
        budgets[layer] += 1
    return budgets
