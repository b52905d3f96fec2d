"""CAKE: layers whose attention is spread wide and moves from query to query get more of the budget
(Qin et al., arXiv:2503.12491).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.claims import ClaimingMethod
from dynamickv.methods.parameters import require_positive
from dynamickv.records import LayerObservation
from dynamickv.scoring import pool, reduce_group


@dataclass(frozen=True, kw_only=True)
class CAKE(ClaimingMethod):
    """Score a position by the mean and the variance of the attention that the observation window
    pays it; share the budget by each layer's preference.

    A layer's preference is D^(1/tau1) x V^(1/tau2): D is the entropy of the window's attention to
    the prefix, V the variance over the window's queries, both summed over heads and positions. What
    a layer cannot hold goes in equal parts to the others. While a prompt is read every layer holds
    what it may still end with: its share of the layers so far, and an equal part of what one
    more layer could not hold.

    Departures from the authors' code: every prompt with n > capacity is compressed, and in one shot
    (theirs leaves n <= capacity + window whole; its cascade loses a token where a budget grows);
    preferences and scores are computed in float32; nothing is evicted while decoding; positions are
    stored in order. Their code sets tau1 and tau2 for each model and cache size, gamma to 200 and
    the window to 32.
    """

    name: ClassVar[str] = "CAKE"
    ignored: ClassVar[tuple[str, ...]] = ("kernel_size", "pooling")
    kernel_size: int = 5
    """Ignored: CAKE pools the mean of 5."""
    pooling: str = "avg"
    """Ignored: CAKE pools the mean of 5."""
    tau1: float = 1.0
    """Temperature of the entropy: the larger, the less it matters."""
    tau2: float = 1.0
    """Temperature of the variance: the larger, the less it matters."""
    gamma: float = 200.0
    """Weight of a position's variance beside its mean attention."""

    def __post_init__(self) -> None:
        ClaimingMethod.__post_init__(self)
        if self.window_size < 2:
            raise ValueError(
                f"CAKE reads how attention varies over the window; window_size must be at least 2 "
                f"tokens, got {self.window_size}"
            )
        require_positive("gamma", self.gamma)
        for name in ("tau1", "tau2"):
            require_positive(name, getattr(self, name))
            if getattr(self, name) < 0.1:
                raise ValueError(f"{name} must be at least 0.1, got {getattr(self, name)}")

    def weigh(self, layer: LayerObservation) -> tuple[Tensor, float]:
        """Scores, and the layer's preference."""
        self.require_queries(layer)
        mean, variance, dispersion = layer.moments(self.window_size)
        entropy, shift = float(dispersion.sum()), float(variance.sum())
        scores = mean + self.gamma * variance
        if self.granularity == "kv_head":
            scores = reduce_group(scores, layer.num_kv_heads, self.group_reduction)
        preference = max(entropy, 0.0) ** (1 / self.tau1) * shift ** (1 / self.tau2)
        return pool(scores, 5, "avg"), preference

    def budgets_of(self, claims: Sequence[float], num_layers: int, prefix_length: int) -> list[int]:
        """Prefix tokens that the layers seen so far may hold."""
        total = self.mean_budget * num_layers
        claimed = sum(claims)
        shares = [
            claim / claimed * total if claimed > 0 else total / len(claims) for claim in claims
        ]
        if len(claims) == num_layers:
            budgets = [min(int(share), prefix_length) for share in shares]
            over = sum(max(int(share) - prefix_length, 0) for share in shares)
            _hand_out(over, budgets, prefix_length)
            _hand_out(total - sum(budgets), budgets, prefix_length)
            return [min(budget, prefix_length) for budget in budgets]
        # A layer yet to come may claim everything and hold its prefix alone. Rounding adds the
        # truncated shares of all layers, shared by at least so many that are not full.
        extra = max(total - prefix_length, 0) // (num_layers - 1)
        open_layers = max(num_layers - total // prefix_length, 1)
        extra += 4 + (num_layers - 1) // open_layers
        return [min(int(share) + extra, prefix_length) for share in shares]


def _hand_out(tokens: int, budgets: list[int], most: int) -> None:
    """Add tokens to the budgets below `most`, in equal parts, the remainder to the first of them;
    as the reference rounds, so that budgets match it to the token."""
    room = [layer for layer, budget in enumerate(budgets) if budget < most]
    for place, layer in enumerate(room):
        budgets[layer] += tokens // len(room) + (place < tokens % len(room))
