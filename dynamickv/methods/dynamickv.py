"""DynamicKV: layers compete for one budget, settled every few layers (Zhou et al.,
arXiv:2412.14838).

Every layer first keeps up to `r_max` times the mean budget. After every `update_interval` layers
the scores of all layers seen are ranked together, each layer's share of the best becomes its
budget, and all of them are cut to it; on a CPU a waiting layer holds no more than it can keep then.
With `progressive=False` this happens once, after the last layer, and exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import Tensor

from dynamickv.methods.base import ScoredMethod
from dynamickv.methods.parameters import require_integer, require_positive
from dynamickv.methods.selection import ScoredSelection, Selection
from dynamickv.records import HeldLayer, LayerObservation
from dynamickv.scoring import count_global_top, counting_global_top


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """One update of the budgets, number by number: one entry per layer seen."""

    counts: list[int]
    """How many of the best scores lie in the layer."""
    shares: list[int]
    """The same, divided by the layers seen and rounded down; only their proportions matter."""
    claims: list[int]
    """The layer's share of its first budget, r_max times the mean."""
    excess: float
    """All claims together over what the whole model may keep; the paper's r. 0: no claim at
    all."""
    budgets: list[int]
    """Claims divided by `excess`; the newest layer also gets what rounding left."""


@dataclass(frozen=True, kw_only=True)
class DynamicKV(ScoredMethod):
    """Share `capacity` x layers tokens by where the prompt's attention mass lies, re-normalised
    every few layers.

    Departures from the authors' code: a prompt with n <= capacity is kept whole; a budget is
    clamped to what the layer still holds (theirs duplicates the window); a last update follows the
    last layer when the layers are no multiple of `update_interval` (theirs leaves those layers at
    r_max x budget); shares that all round to nothing become an even split (theirs raises);
    `update_interval` is a parameter (theirs is 4); scores stay float32; positions are stored in
    order; the default granularity is the KV head.
    """

    name: ClassVar[str] = "DynamicKV"
    r_max: float = 10.0
    """A layer may first hold r_max times the mean budget."""
    update_interval: int = 4
    """Layers between two re-allocations (the paper's m)."""
    progressive: bool = True
    """False: one allocation over all layers, after the last, that spends the budget to the last
    token: a layer keeps its share of the best scores, at most r_max times the mean; what lies above
    goes to the next best of the others. Not in the paper."""

    def __post_init__(self) -> None:
        ScoredMethod.__post_init__(self)
        require_positive("r_max", self.r_max)
        require_integer("update_interval", self.update_interval, 1, "layer")
        if not isinstance(self.progressive, bool):
            raise ValueError(f"progressive must be True or False, got {self.progressive!r}")

    def start(self, num_layers: int) -> Selection:
        """Score, allocate every few layers, cut."""
        return UpdatedSelection(self, num_layers)

    def first_budget(self, layer: int, num_layers: int, prefix_length: int) -> int:
        """r_max times the mean budget, or the whole prefix."""
        return int(min(self.r_max * self.mean_budget, prefix_length))

    def updates_after(self, layer: int, num_layers: int) -> bool:
        """After every `update_interval` layers, and after the last; only there if not
        progressive."""
        last = layer + 1 == num_layers
        return last or (self.progressive and (layer + 1) % self.update_interval == 0)

    def allocate(self, scores: Sequence[Tensor], num_layers: int) -> list[int]:
        """Prefix budgets of the layers seen, summing to mean_budget x num_layers at every update.

        The roundings are the reference's, in its number formats, so that budgets match it to the
        token.
        """
        return self.allocating(scores, num_layers)()

    def allocating(self, scores: Sequence[Tensor], num_layers: int) -> Callable[[], list[int]]:
        """`allocate`, begun: what is given waits for the device to have counted."""
        if not self.progressive:
            return partial(self._exact_budgets, list(scores))
        seen, (heads, prefix_length) = len(scores), scores[0].shape
        counting = counting_global_top(scores, self.mean_budget * heads * seen)
        return lambda: self.settle(counting(), heads, prefix_length, num_layers).budgets

    def most_later(self, scores: Sequence[Tensor], num_layers: int) -> list[int]:
        """Of the layers that wait for an update: those to come can only take from the number of
        their best scores. Roundings are counted in the layer's favour, so that budgets are what
        they would be.
        """
        # An accelerator would have to wait for the host.
        if not self.progressive or self.edited or scores[0].device.type != "cpu":
            return []
        seen, (heads, prefix_length) = len(scores), scores[0].shape
        later = min(-(-seen // self.update_interval) * self.update_interval, num_layers)
        # `settle` loses less than one count and less than one token a layer to rounding.
        counted = self.mean_budget * heads - later
        claimed = self.first_budget(0, num_layers, prefix_length) - later
        if counted <= 0 or claimed <= 0:
            return []
        best = count_global_top(scores, self.mean_budget * heads * later)
        total = self.mean_budget * num_layers * (1 + later / claimed) * 1.001
        waiting = seen % self.update_interval
        return [int(total * (count // later) / counted) + 1 for count in best[-waiting:]]

    def settle(
        self, counts: Sequence[int], heads: int, prefix_length: int, num_layers: int
    ) -> Settlement:
        """One update, from the best scores' numbers to budgets, with every step between.

        Args:
            counts: per layer seen, how many of the mean_budget x heads x layers seen best scores
                lie there.
            heads: heads that are scored in a layer.
            prefix_length: prompt tokens before the observation window.
            num_layers: layers of the whole model.
        """
        seen = len(counts)
        total = self.mean_budget * num_layers
        shares = [count // seen for count in counts]
        if seen == num_layers:
            shares[-1] += self.mean_budget * heads - sum(shares)
        claims = self._claims(shares, self.first_budget(0, num_layers, prefix_length))
        excess = float(sum(claims) / total)
        if excess:
            # float64 floor division of the exact integer, not division then floor: they differ at
            # exact multiples.
            budgets = [int(claim // excess) for claim in claims]
            budgets[-1] += total - sum(budgets)
        else:
            budgets = [total // seen] * seen
            budgets[-1] += total % seen
        return Settlement(
            counts=list(counts), shares=shares, claims=claims, excess=excess, budgets=budgets
        )

    def budgets_again(self, layers: Sequence[HeldLayer], scores: Sequence[Tensor]) -> list[int]:
        """While answering all layers are known at once: one allocation, to the last token."""
        return self._exact_budgets(scores)

    def _exact_budgets(self, scores: Sequence[Tensor]) -> list[int]:
        """Prefix budgets by the best scores of all layers together, summing to mean_budget x
        layers, none above `first_budget`. Layers may hold different numbers."""
        heads = scores[0].shape[0]
        most = [self.first_budget(0, len(scores), layer.shape[1]) for layer in scores]
        budgets: dict[int, float] = {}
        total = room = min(self.mean_budget * len(scores), sum(most))
        open_layers = list(range(len(scores)))
        while open_layers:
            counts = count_global_top([scores[layer] for layer in open_layers], room * heads)
            full = [
                layer
                for layer, count in zip(open_layers, counts, strict=True)
                if count > most[layer] * heads
            ]
            if not full:
                budgets |= {
                    layer: count / heads for layer, count in zip(open_layers, counts, strict=True)
                }
                break
            budgets |= {layer: float(most[layer]) for layer in full}
            room -= sum(most[layer] for layer in full)
            open_layers = [layer for layer in open_layers if layer not in full]
        whole = [int(budgets[layer]) for layer in range(len(scores))]
        missing = total - sum(whole)
        remainders = sorted(open_layers, key=lambda layer: whole[layer] - budgets[layer])
        for layer in remainders[:missing]:
            whole[layer] += 1
        return whole

    @staticmethod
    def _claims(shares: Sequence[int], most: int) -> list[int]:
        """Each layer's share of `most` tokens, truncated in float32 as the reference does."""
        if not any(shares):
            return [0] * len(shares)
        fractions = np.asarray(shares, np.float32) / np.float32(sum(shares))
        return [int(claim) for claim in np.float32(most) * fractions]


class UpdatedSelection(ScoredSelection):
    """One prompt's walk through the layers, of which an update's numbers may be read later."""

    method: DynamicKV

    def __init__(self, method: DynamicKV, num_layers: int) -> None:
        super().__init__(method, num_layers)
        self._updates: list[Callable[[], list[int]]] = []
        """Budgets that were begun and not read yet, in order."""

    def observe(self, observation: LayerObservation) -> range:
        """As `ScoredSelection` does."""
        changed = self.observe_ahead(observation)
        return self.catch_up() or changed

    def observe_ahead(self, observation: LayerObservation) -> range:
        """Score the next layer and begin an update if its turn has come; the layer, which holds its
        first budget."""
        layer = len(self.scores)
        scores = self.method.score(observation)
        self.scores.append(scores)
        first = self.method.first_budget(layer, self.num_layers, scores.shape[1])
        self.held.append(min(first, scores.shape[1]))
        if self.method.updates_after(layer, self.num_layers):
            self._updates.append(self._begun())
        return range(layer, layer + 1)

    def _begun(self) -> Callable[[], list[int]]:
        """The update of the layers seen, by the method's own `allocate` where it has one."""
        if type(self.method).allocate is not DynamicKV.allocate:
            return partial(self.method.allocate, list(self.scores), self.num_layers)
        return self.method.allocating(self.scores, self.num_layers)

    def catch_up(self) -> range:
        """Cut all layers that were seen at the updates to their budgets; these layers."""
        changed = range(0)
        for update in self._updates:
            budgets = update()
            changed = range(len(budgets))
            self.history.append(tuple(budgets))
            self.held[: len(budgets)] = map(min, self.held, budgets)
        self._updates.clear()
        return changed
