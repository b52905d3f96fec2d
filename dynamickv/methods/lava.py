"""LAVa: attention times the size of the values, compared over all heads of a layer; layers whose
scores are spread evenly get more of the budget (Shen et al., arXiv:2509.09754).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.claims import ClaimingMethod, shares_of
from dynamickv.records import LayerObservation
from dynamickv.scoring import pool, reduce_group


@dataclass(frozen=True, kw_only=True)
class LAVa(ClaimingMethod):
    """Score like SnapKV, times the largest L1 norm of the head's values; the heads of a layer
    compete for its budget, and layers share by the normalised entropy of their scores.

    Every layer is cut again after each layer that follows, as the authors' is; budgets only fall.

    Departures from the authors' code: the floor of a head is alpha times its layer's budget
    (theirs, alpha x capacity, spends alpha x window tokens a head too many); heads compete for what
    is above the floor, so that the layer's budget is spent to the token; a layer's budget is at
    most what it has, and the rest goes to the others (theirs fails); a prompt with n <= capacity is
    kept whole; scores stay float32; positions are stored in order. The option `normalize` of
    theirs, which none of their scripts sets, is not here. Their window is 32.
    """

    name: ClassVar[str] = "LAVa"
    capabilities: ClassVar[Capabilities] = replace(
        ClaimingMethod.capabilities, values=True, vllm=False
    )
    cascades: ClassVar[bool] = True
    group_reduction: str = "max"
    head_budgets: str = "adaptive"
    alpha: float = 0.2
    """Share of the layer's budget that every head keeps, 0 to 1."""

    def __post_init__(self) -> None:
        ClaimingMethod.__post_init__(self)
        if (
            isinstance(self.alpha, bool)
            or not isinstance(self.alpha, (int, float))
            or not 0 <= self.alpha <= 1
        ):
            raise ValueError(f"alpha must be a number from 0 to 1, got {self.alpha!r}")

    @property
    def head_floor(self) -> float:
        """`alpha`."""
        return self.alpha

    def weigh(self, layer: LayerObservation) -> tuple[Tensor, float]:
        """Scores, and how evenly they are spread over the layer, 0 to 1."""
        if layer.values is None:
            raise ValueError(
                "LAVa needs the values, which were not recorded; give retain the values of every "
                "layer"
            )
        attention = self.raw_scores(layer) / self.window_size
        sizes = layer.value_sizes()[:, : attention.shape[1]].amax(dim=1)
        heads = attention.shape[0]
        scores = pool(attention, self.kernel_size, self.pooling)
        scores *= sizes.repeat_interleave(heads // len(sizes))[:, None]
        if self.granularity == "kv_head":
            scores = reduce_group(scores, layer.num_kv_heads, self.group_reduction)
        return scores, evenness(scores)

    def budgets_of(self, claims: Sequence[float], num_layers: int, prefix_length: int) -> list[int]:
        """Prefix tokens that the layers seen so far may hold, rounded down."""
        shares = shares_of(claims, self.mean_budget * num_layers, prefix_length)
        return [int(share) for share in shares]


def evenness(scores: Tensor) -> float:
    """Entropy of the scores over all heads and positions, 1 where all are equal."""
    parts = scores / (scores.sum() + 1e-16)
    entropy = -(parts * (parts + 1e-16).log()).sum()
    return max(float(entropy), 0.0) / math.log(scores.numel()) if scores.numel() > 1 else 1.0
