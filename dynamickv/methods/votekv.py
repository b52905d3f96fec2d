"""VoteKV: the heads of all layers vote for places of the prompt, and every head keeps those that
won beside its own. Ours, not from a paper; benchmarks/search.py is the search it came out of.

What a question asks for is looked up by few heads. Where each chooses for itself, the others drop
it, and they read it when the answer is written. A head that looks something up attends sharply to
few places: the squares of attention tell it from heads that look everywhere. What is looked up
often stands behind the words that are matched, so a vote counts for the places that follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.parameters import require_integer
from dynamickv.methods.selection import ScoredSelection, Selection
from dynamickv.methods.shiftkv import SINKS, ShiftKV, weight_of_depth
from dynamickv.records import LayerObservation
from dynamickv.scoring import pool, top_positions


@dataclass(frozen=True, kw_only=True)
class VoteKV(ShiftKV):
    """Share the budget as ShiftKV does. Of it, `voted_share` goes to the places that all heads
    vote for, the same in every layer and head, and the rest to each head's own, scored as SnapKV
    does.

    A head's vote for a position is the square of the most attention that one of the last
    `voting_size` tokens pays to it, times its layer's claim on the budget; the first 4 positions
    and the voting tokens get none. Votes are summed over all heads and layers, averaged over
    `smoothing` positions, and count for the `reach` positions that follow. What won is known once
    the last layer is read: until then every layer holds the whole prompt.
    """

    name: ClassVar[str] = "VoteKV"
    capabilities: ClassVar[Capabilities] = replace(ShiftKV.capabilities, decoding=False)
    voted_share: float = 0.75
    """Part of the mean budget that goes to the places voted for, 0 to 1."""
    voting_size: int = 32
    """Trailing prompt tokens that vote."""
    smoothing: int = 9
    """Positions over which votes are averaged, odd."""
    reach: int = 32
    """Positions behind a place for which its votes count."""

    def __post_init__(self) -> None:
        ShiftKV.__post_init__(self)
        for name in ("voting_size", "smoothing"):
            require_integer(name, getattr(self, name), 1, "token")
        if self.smoothing % 2 == 0:
            raise ValueError(
                f"smoothing must be odd to keep positions aligned, got {self.smoothing}"
            )
        require_integer("reach", self.reach, 0, "token")
        share = self.voted_share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"voted_share must be a number from 0 to 1, got {share!r}")

    @property
    def tail(self) -> int:
        """The queries that are compared and those that vote."""
        return max(self.context_size, self.voting_size)

    def start(self, num_layers: int) -> Selection:
        """Score and count votes; share and cut after the last layer."""
        return VoteSelection(self, num_layers)

    def votes(self, layer: LayerObservation) -> Tensor:
        """What a layer's heads vote for together, before its claim, (prompt_length,) float32."""
        voting = min(self.voting_size, layer.prompt_length, layer.queries.shape[1])
        votes = layer.peaks(voting).square().sum(dim=0)
        votes[:SINKS] = 0
        return F.pad(votes, (0, voting))

    def won(self, votes: Tensor) -> Tensor:
        """What the votes of all layers add to every head's scores, which are at most 1:
        (prefix,), from 2 to 3 where a place is kept for them and 0 elsewhere.

        Args:
            votes: (prompt_length,), summed over layers.
        """
        counted = pool(votes[None], self.smoothing, "avg")
        reach = min(self.reach, len(votes))
        counted = F.max_pool1d(F.pad(counted, (reach, 0)), reach + 1, stride=1)[0]
        counted = counted[: len(counted) - self.window_size]
        chosen = top_positions(counted[None], int(self.voted_share * self.mean_budget))[0]
        chosen = chosen[counted[chosen] > 0]
        added = torch.zeros_like(counted)
        added[chosen] = 2 + counted[chosen] / counted.max().clamp_min(_LEAST)
        return added


_LEAST = torch.finfo(torch.float32).tiny


class VoteSelection(ScoredSelection):
    """One prompt's walk through the layers; nothing is dropped before all have voted."""

    method: VoteKV

    def __init__(self, method: VoteKV, num_layers: int) -> None:
        super().__init__(method, num_layers)
        self.claims: list[float] = []
        self.votes: Tensor | None = None

    def observe(self, observation: LayerObservation) -> range:
        """Score the next layer and count its votes; after the last, all layers change."""
        method = self.method
        scores, claim = method.weigh(observation)
        votes = (
            claim * weight_of_depth(len(self.claims), self.num_layers) * method.votes(observation)
        )
        self.votes = votes if self.votes is None else self.votes + votes.to(self.votes.device)
        self.scores.append(scores / scores.amax(dim=1, keepdim=True).clamp_min(_LEAST))
        self.claims.append(claim)
        self.held.append(scores.shape[1])
        seen = len(self.claims)
        if seen < self.num_layers:
            return range(seen - 1, seen)
        won = method.won(self.votes)
        self.scores = [scores + won.to(scores.device) for scores in self.scores]
        budgets = method.budgets_of(self.claims, seen, scores.shape[1])
        self.history.append(tuple(budgets))
        self.held = [min(budget, scores.shape[1]) for budget in budgets]
        return range(seen)
