"""Which prompt positions a method keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamickv.records.observation import LayerObservation

Heads = Tensor | tuple[Tensor, ...]
"""Positions per head: (heads, kept), or one (kept,) per head where heads keep different numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The prompt positions a method keeps in every layer and head."""

    indices: tuple[Heads, ...]
    """Per compressed layer, LongTensor (heads, kept): ascending positions, observation window
    included. With adaptive head budgets a tuple of one LongTensor (kept,) per head."""
    prompt_length: int
    budget_history: tuple[tuple[int, ...], ...] = ()
    """DynamicKV: prefix budgets (window excluded) of the layers seen so far, after each update."""

    @property
    def budgets(self) -> list[int]:
        """Kept prompt tokens per layer and head, observation window included; the mean over heads
        where they differ, which is whole."""
        return [sum(head.shape[0] for head in kept) // len(kept) for kept in self.indices]

    @property
    def kept_fraction(self) -> float:
        """Kept positions over all positions, across layers and heads."""
        heads = [head for kept in self.indices for head in kept]
        return sum(head.shape[0] for head in heads) / (len(heads) * self.prompt_length)

    @classmethod
    def everything(
        cls, observations: Sequence[LayerObservation], granularity: str = "kv_head"
    ) -> Retention:
        """Keep the whole prompt, per KV head or per query head."""
        return cls(
            indices=tuple(
                torch.arange(layer.prompt_length, device=layer.keys.device).expand(
                    layer.num_kv_heads if granularity == "kv_head" else layer.num_query_heads, -1
                )
                for layer in observations
            ),
            prompt_length=observations[0].prompt_length,
        )
