"""What a compression method is: parameters, a row of the table of capabilities, and the selection
it starts for each prompt. Nothing here knows models or caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.edits import Spans, read_spans, require_apart, whole_prompt
from dynamickv.methods.parameters import require_choice, require_integer
from dynamickv.methods.selection import HEAD_FLOOR, FixedSelection, ScoredSelection, Selection
from dynamickv.records import HeldLayer, LayerObservation, Retention
from dynamickv.scoring import pool, reduce_group, top_positions


@dataclass(frozen=True, kw_only=True)
class CompressionMethod(ABC):
    """A method is its parameters and the selection it starts for each prompt."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    """What it reads, takes and works in."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Parameters that it has for its kind's sake and does not read."""

    @property
    def needs_mass(self) -> bool:
        """Whether it reads the attention of all queries (LayerObservation.mass)."""
        return self.capabilities.mass

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

    def begin(self, num_layers: int, prompt_length: int) -> Selection:
        """Begin choosing for a prompt of that length; of one that fits everything is kept."""
        return FixedSelection(self.whole) if self.fits(prompt_length) else self.start(num_layers)

    def select(self, observations: Sequence[LayerObservation]) -> Retention:
        """Choose the positions to keep in every layer; everything if the prompt fits."""
        selection = self.begin(len(observations), observations[0].prompt_length)
        for layer in observations:
            selection.observe_ahead(layer)
        selection.catch_up()
        return selection.retention()


@dataclass(frozen=True, kw_only=True)
class EvictingMethod(CompressionMethod):
    """A method that keeps `capacity` tokens of a longer prompt."""

    capabilities: ClassVar[Capabilities] = Capabilities(capacity=True, query_heads=True)
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
        if self.granularity == "query_head" and not self.capabilities.query_heads:
            raise ValueError(f"{self.name} makes one choice per KV head; use granularity='kv_head'")
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

    def choose_again(self, layers: Sequence[HeldLayer]) -> list[Tensor]:
        """While answering: which of the places of all that each layer holds are kept, (heads,
        kept) ascending, `capacity` of them in the mean. Asked only where `capabilities.decoding`.
        """
        raise ValueError(
            f"{self.name} does not choose again while answering; override choose_again"
        )

    def fits(self, prompt_length: int) -> bool:
        """A prompt no longer than `capacity` is kept whole, but for what is evicted."""
        return prompt_length <= self.capacity

    def whole(self, layer: LayerObservation) -> Tensor:
        """What a layer holds of a prompt that fits, (heads, held)."""
        heads = layer.num_kv_heads if self.granularity == "kv_head" else layer.num_query_heads
        return whole_prompt(layer.prompt_length, heads, layer.keys.device, self.evicted)


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(EvictingMethod):
    """Keep the observation window and the best-scored positions before it: score each layer, share
    the budget, cut."""

    capabilities: ClassVar[Capabilities] = replace(
        EvictingMethod.capabilities, window=True, adaptive_heads=True, decoding=True
    )
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

    @property
    def head_floor(self) -> float:
        """Share of its layer's budget that every head keeps where heads compete."""
        return HEAD_FLOOR

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
        self.require_queries(layer)
        return layer.attention(self.window_size)

    def require_queries(self, layer: LayerObservation) -> None:
        """Raise ValueError where fewer queries were recorded than the window has."""
        tail = layer.queries.shape[1]
        if tail < self.window_size:
            raise ValueError(
                f"window_size={self.window_size} needs as many queries, and {tail} were recorded; "
                f"prefill with tail={self.window_size} or lower window_size"
            )

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

    def most_later(self, scores: Sequence[Tensor], num_layers: int) -> list[int]:
        """Prefix tokens that the last layers seen can keep at the next update, at most: a layer
        being read need not hold more. None of them unless overridden."""
        return []

    def choose_again(self, layers: Sequence[HeldLayer]) -> list[Tensor]:
        """The best of what is held before the window, and the window."""
        scores = [self.score(layer) for layer in layers]
        budgets = self.budgets_again(layers, scores)
        chosen = []
        for layer, scored, budget in zip(layers, scores, budgets, strict=True):
            window = torch.arange(scored.shape[1], layer.prompt_length, device=scored.device)
            kept = top_positions(scored, budget)
            chosen.append(torch.cat([kept, window.expand(len(kept), -1)], dim=1))
        return chosen

    def budgets_again(self, layers: Sequence[HeldLayer], scores: Sequence[Tensor]) -> list[int]:
        """While answering: how many places before the window each layer keeps, no more than
        mean_budget x layers together. Uniform unless overridden.

        Args:
            scores: per layer, (heads, places before the window), which differ between layers.
        """
        return [min(self.mean_budget, scored.shape[1]) for scored in scores]
