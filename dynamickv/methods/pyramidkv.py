"""PyramidKV: budgets that shrink linearly with depth, fixed before the prompt is seen
(arXiv:2406.02069)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.base import ScoredMethod
from dynamickv.methods.parameters import require_integer
from dynamickv.records import HeldLayer


@dataclass(frozen=True, kw_only=True)
class PyramidKV(ScoredMethod):
    """Score like SnapKV; give early layers more and late layers less, in equal steps.

    As in the reference (KVCache-Factory) the step is rounded down, so that all layers together keep
    more than capacity x layers (by up to half a token per layer and step); prompts shorter than
    twice the mean budget are kept evenly. Departures: a prompt with n <= capacity is kept whole,
    one layer divides nothing by zero, scores stay float32, kept positions are stored in position
    order, the default granularity is the KV head.
    """

    name: ClassVar[str] = "PyramidKV"
    beta: int = 20
    """The last layer's prefix budget is the mean budget / beta, where the prompt allows."""

    def __post_init__(self) -> None:
        ScoredMethod.__post_init__(self)
        require_integer("beta", self.beta, 1, "step")

    def first_budget(self, layer: int, num_layers: int, prefix_length: int) -> int:
        """A straight line from the first layer down to the last."""
        mean = self.mean_budget
        if prefix_length + self.window_size < 2 * mean:
            return mean
        low = mean // self.beta
        high = 2 * mean - low
        if high >= prefix_length:
            high = prefix_length
            low = 2 * mean - high
        return high - layer * ((high - low) // max(num_layers - 1, 1))

    def budgets_again(self, layers: Sequence[HeldLayer], scores: Sequence[Tensor]) -> list[int]:
        """The straight line for as many tokens as were seen, no layer above what it holds. What
        rounding the step down gives beyond the mean is taken from the largest."""
        budgets = [
            min(self.first_budget(place, len(layers), layer.seen - self.window_size), held.shape[1])
            for place, (layer, held) in enumerate(zip(layers, scores, strict=True))
        ]
        for _ in range(sum(budgets) - self.mean_budget * len(budgets)):
            budgets[budgets.index(max(budgets))] -= 1
        return budgets
