"""Methods whose layers claim a part of the budget, each by what is seen of it alone; and how claims
become budgets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.base import ScoredMethod
from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.selection import ScoredSelection, Selection
from dynamickv.records import LayerObservation


@dataclass(frozen=True, kw_only=True)
class ClaimingMethod(ScoredMethod):
    """Score every layer and weigh it; share the budget by weight."""

    capabilities: ClassVar[Capabilities] = replace(ScoredMethod.capabilities, decoding=False)
    cascades: ClassVar[bool] = False
    """Whether the record tells the budgets after every layer, or only the last."""

    @abstractmethod
    def weigh(self, layer: LayerObservation) -> tuple[Tensor, float]:
        """Scores as `score` gives them, and the layer's claim on the budget."""

    @abstractmethod
    def budgets_of(self, claims: Sequence[float], num_layers: int, prefix_length: int) -> list[int]:
        """Prefix tokens that the layers seen so far may hold, none above `prefix_length`; once all
        are seen, their budgets."""

    def score(self, layer: LayerObservation) -> Tensor:
        """Importance per head and prefix position, (heads, prompt_length - window_size),
        float32."""
        return self.weigh(layer)[0]

    def start(self, num_layers: int) -> Selection:
        """Weigh, score, share, cut."""
        return ClaimSelection(self, num_layers)


class ClaimSelection(ScoredSelection):
    """One prompt's walk through the layers; what all hold follows from the claims seen so far."""

    method: ClaimingMethod

    def __init__(self, method: ClaimingMethod, num_layers: int) -> None:
        super().__init__(method, num_layers)
        self.claims: list[float] = []

    def observe(self, observation: LayerObservation) -> range:
        """Weigh and score the next layer; the layers that hold less than before, and itself."""
        scores, claim = self.method.weigh(observation)
        self.scores.append(scores)
        self.claims.append(claim)
        seen = len(self.claims)
        budgets = self.method.budgets_of(self.claims, self.num_layers, scores.shape[1])
        if self.method.cascades or seen == self.num_layers:
            self.history.append(tuple(budgets))
        before = [*self.held, scores.shape[1]]
        self.held = [min(held, budget) for held, budget in zip(before, budgets, strict=True)]
        fell = (layer for layer in range(seen) if self.held[layer] < before[layer])
        return range(next(fell, seen - 1), seen)


def shares_of(claims: Sequence[float], total: int, most: int | Sequence[int]) -> list[float]:
    """Parts of `total` proportional to claims, none above `most` (of all layers, or of each); what
    a full layer cannot take goes to the others in proportion. They sum to `total` where `most`
    allows."""
    limits = [most] * len(claims) if isinstance(most, int) else list(most)
    shares = [0.0] * len(claims)
    open_layers = list(range(len(claims)))
    room = min(total, sum(limits))
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
    return shares
