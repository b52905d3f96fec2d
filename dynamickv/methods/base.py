"""What a compression method is: parameters, and a choice of prompt positions made from observed
layers.

A `Selection` walks the layers in order, so that the same code serves a finished prefill (all layers
at once) and a prefill that is pruned while it runs (layer by layer). Nothing here knows models or
caches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamickv.methods.edits import Spans, edited_positions, read_spans, require_apart, whole_prompt
from dynamickv.records import Heads, LayerObservation, Retention
from dynamickv.scoring import (
    pool,
    reduce_group,
    share_among_heads,
    top_positions,
    top_positions_of_layers,
)

HEAD_FLOOR = 0.2
"""Share of the mean budget that adaptive head budgets leave to every head (Ada-KV's safeguard)."""


@dataclass(frozen=True, kw_only=True)
class CompressionMethod(ABC):
    """A method is its parameters and the selection it starts for each prompt."""

    name: ClassVar[str]
    needs_mass: ClassVar[bool] = False
    """Whether it reads the attention of all queries (LayerObservation.mass)."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Parameters that it has for its kind's sake and does not read."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters by name, JSON-ready."""
        return asdict(self)

    @property
    def tail(self) -> int:
        """Trailing queries it reads."""
        return 1

    @abstractmethod
    def fits(self, prompt_length: int) -> bool:
        """Whether a prompt is kept whole."""

    def whole(self, layer: LayerObservation) -> Tensor:
        """What a layer holds of a prompt that fits, (heads, held)."""
        return whole_prompt(layer.prompt_length, layer.num_kv_heads, layer.keys.device, ())

    @abstractmethod
    def start(self, num_layers: int) -> Selection:
        """Begin choosing for one prompt, which does not fit."""

    def select(self, observations: Sequence[LayerObservation]) -> Retention:
        """Choose the positions to keep in every layer."""
        selection = self.start(len(observations))
        for layer in observations:
            selection.observe(layer)
        return selection.retention()


class Selection(ABC):
    """One prompt's walk through the layers."""

    @abstractmethod
    def observe(self, observation: LayerObservation) -> range:
        """Take in the next layer; the layers whose holdings changed."""

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


@dataclass(frozen=True, kw_only=True)
class EvictingMethod(CompressionMethod):
    """A method that keeps `capacity` tokens of a longer prompt."""

    capacity: int
    """Mean prompt tokens kept per layer and head, observation window included (the papers' "KV
    cache size")."""
    granularity: str = "kv_head"
    """"kv_head": one choice per KV head, scores joined over its query heads before pooling.
    "query_head": one choice per query head; the cache then stores every query head and is
    num_query_heads / num_kv_heads times larger."""

    pinned: Spans = ()
    """[first, last) spans of prompt positions that every layer and head keeps, in the places of the
    worst it would have chosen; where it has fewer places it holds more."""
    evicted: Spans = ()
    """[first, last) spans that none keeps, be they in the observation window; the next best take
    their places."""

    def __post_init__(self) -> None:
        require_integer("capacity", self.capacity, 1, "token")
        require_choice("granularity", self.granularity, ("kv_head", "query_head"))
        for name in ("pinned", "evicted"):
            object.__setattr__(self, name, read_spans(name, getattr(self, name)))
        require_apart(self.pinned, self.evicted)

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters by name, JSON-ready; spans only where there are any."""
        spans = {
            name: [list(span) for span in getattr(self, name)] for name in ("pinned", "evicted")
        }
        plain = {name: value for name, value in asdict(self).items() if name not in spans}
        return plain | {name: value for name, value in spans.items() if value}

    @property
    def edited(self) -> bool:
        """Whether a person pinned or evicted something."""
        return bool(self.pinned or self.evicted)

    def fits(self, prompt_length: int) -> bool:
        """A prompt no longer than `capacity` is kept whole, but for what is evicted."""
        return prompt_length <= self.capacity

    def whole(self, layer: LayerObservation) -> Tensor:
        """What a layer holds of a prompt that fits, (heads, held)."""
        heads = layer.num_kv_heads if self.granularity == "kv_head" else layer.num_query_heads
        return whole_prompt(layer.prompt_length, heads, layer.keys.device, self.evicted)

    def select(self, observations: Sequence[LayerObservation]) -> Retention:
        """Choose the positions to keep in every layer; everything if the prompt fits."""
        length = observations[0].prompt_length
        if self.fits(length):
            kept = tuple(self.whole(layer) for layer in observations)
            return Retention(indices=kept, prompt_length=length)
        return CompressionMethod.select(self, observations)


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(EvictingMethod):
    """Keep the observation window and the best-scored positions before it: score each layer, share
    the budget, cut."""

    window_size: int = 8
    """Trailing prompt tokens whose queries vote and which are always kept."""
    kernel_size: int = 7
    """Pooling width in tokens, odd; wider keeps longer contiguous runs."""
    pooling: str = "max"
    """"max" or "avg"."""
    group_reduction: str = "mean"
    """How query heads are joined with "kv_head": "mean", "max" or "sum"."""
    head_budgets: str = "uniform"
    """"uniform": every head of a layer keeps as many tokens. "adaptive": the heads compete for the
    layer's budget (Ada-KV, arXiv:2407.11550); each gets a fifth of the mean, then the best scores
    of all heads fill the rest, so that the budget is spent to the last token."""

    def __post_init__(self) -> None:
        EvictingMethod.__post_init__(self)
        require_integer("window_size", self.window_size, 1, "token")
        require_integer("kernel_size", self.kernel_size, 1, "token")
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd to keep positions aligned, got {self.kernel_size}"
            )
        if self.capacity < self.least_capacity:
            raise ValueError(
                f"capacity must exceed window_size={self.window_size} tokens, got {self.capacity}"
            )
        require_choice("pooling", self.pooling, ("max", "avg"))
        require_choice("group_reduction", self.group_reduction, ("mean", "max", "sum"))
        require_choice("head_budgets", self.head_budgets, ("uniform", "adaptive"))

    @property
    def least_capacity(self) -> int:
        """The window and at least one token before it."""
        return self.window_size + 1

    @property
    def tail(self) -> int:
        """The window's queries."""
        return self.window_size

    def start(self, num_layers: int) -> Selection:
        """Score, allocate, cut."""
        return ScoredSelection(self, num_layers)

    @property
    def mean_budget(self) -> int:
        """Mean prefix tokens per layer and head: capacity without the window."""
        return self.capacity - self.window_size

    def raw_scores(self, layer: LayerObservation) -> Tensor:
        """Importance per query head before reduction and pooling, (num_query_heads, prompt_length -
        window_size)."""
        tail = layer.queries.shape[1]
        if tail < self.window_size:
            raise ValueError(
                f"window_size={self.window_size} needs as many queries, and {tail} were recorded; "
                f"prefill with tail={self.window_size} or lower window_size"
            )
        return layer.attention(self.window_size)

    def score(self, layer: LayerObservation) -> Tensor:
        """Importance per head and prefix position, (heads, prompt_length - window_size),
        float32."""
        scores = self.raw_scores(layer)
        if self.granularity == "kv_head":
            scores = reduce_group(scores, layer.num_kv_heads, self.group_reduction)
        return pool(scores, self.kernel_size, self.pooling)

    def first_budget(self, layer: int, num_layers: int, prefix_length: int) -> int:
        """Prefix tokens a layer holds as soon as it is computed. Uniform unless overridden."""
        return self.mean_budget

    def updates_after(self, layer: int, num_layers: int) -> bool:
        """Whether the layers seen so far are re-allocated once this layer is scored. Never unless
        overridden."""
        return False

    def allocate(self, scores: Sequence[Tensor], num_layers: int) -> list[int]:
        """New prefix budgets for the layers seen so far; called where `updates_after` says so."""
        raise ValueError(
            f"{self.name} has no re-allocation; override allocate together with updates_after"
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

    def positions(self, layer: int) -> Heads:
        """What a layer holds now, (heads, held + window) ascending."""
        return self.positions_of([layer])[0]

    def positions_of(self, layers: Sequence[int]) -> list[Heads]:
        """What several layers hold now."""
        scores = [self.scores[layer] for layer in layers]
        heads, prefix_length = scores[0].shape
        window = torch.arange(
            prefix_length, prefix_length + self.method.window_size, device=scores[0].device
        )
        budgets = [self.held[layer] for layer in layers]
        if self.method.edited:
            return [
                self._edited(layer, budget) for layer, budget in zip(scores, budgets, strict=True)
            ]
        if self.method.head_budgets == "adaptive":
            return [
                tuple(
                    torch.cat([top_positions(head[None], count)[0], window.to(head.device)])
                    for head, count in zip(
                        layer, share_among_heads(layer, budget, HEAD_FLOOR), strict=True
                    )
                )
                for layer, budget in zip(scores, budgets, strict=True)
            ]
        chosen = top_positions_of_layers(scores, budgets)
        rows = window.expand(heads, -1)
        return [torch.cat([kept, rows.to(kept.device)], dim=1) for kept in chosen]

    def _edited(self, scores: Tensor, budget: int) -> Heads:
        """One layer's positions where a person pinned or evicted some."""
        window = self.method.window_size
        always = scores.new_full((scores.shape[0], window), math.inf)
        count: int | list[int] = budget + window
        if self.method.head_budgets == "adaptive":
            count = [number + window for number in share_among_heads(scores, budget, HEAD_FLOOR)]
        whole = torch.cat([scores, always], dim=1)
        return edited_positions(whole, count, self.method.pinned, self.method.evicted)

    def retention(self) -> Retention:
        """What all layers hold in the end."""
        return Retention(
            indices=tuple(self.positions_of(range(len(self.scores)))),
            prompt_length=self.scores[0].shape[1] + self.method.window_size,
            budget_history=tuple(self.history),
        )


def require_integer(name: str, value: Any, least: int, unit: str) -> None:
    """Raise ValueError unless `value` is an int (not bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number of {unit}s, got {value!r}")
    if value < least:
        plural = "" if least == 1 else "s"
        raise ValueError(f"{name} must be at least {least} {unit}{plural}, got {value}")


def require_positive(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name} must be {' or '.join(repr(choice) for choice in choices)}, got {value!r}"
        )
