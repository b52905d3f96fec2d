"""The model's own eager attention, told which prompt positions to leave out.

Registered with transformers like any attention: it hides the dropped positions of each layer from
the queries that come after the prompt, and records the weights that the prompt's last queries pay.
Which layer a call belongs to is seen from the keys that the cache holds, so that layers that share
keys, run in a loop or expand a latent are told apart. Knows nothing of the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "coverage_reference"


class TracingCache(DynamicCache):
    """transformers' cache, which remembers the layer that was updated last."""

    last = -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent does."""
        self.last = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def place_of(self, key: Tensor) -> int:
        """The layer whose keys these are; the last updated one where they were computed anew."""
        for place, layer in enumerate(self.layers):
            held = getattr(layer, "keys", None)
            if held is not None and held.numel() and held.data_ptr() == key.data_ptr():
                return place
        return self.last


@dataclass(kw_only=True)
class Reference:
    """One run's dropped positions, and what it saw."""

    cache: TracingCache
    prompt_length: int
    window: int
    """Last queries of the prompt whose weights are recorded."""
    dropped: Mapping[int, Tensor] = field(default_factory=dict)
    """By layer, (heads, prompt_length) bool; query heads are a multiple of heads."""
    weights: dict[int, Tensor] = field(default_factory=dict)
    """By layer, (query_heads, rows, prompt_length): what the layer's own queries paid, summed over
    them; of layers that read another's keys the reader's rows are in `readers`."""
    readers: dict[int, list[Tensor]] = field(default_factory=dict)
    hidden: set[int] = field(default_factory=set)
    """Layers in which something was hidden."""
    calls: int = 0

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """The module's own eager attention with the mask of this layer."""
        self.calls += 1
        eager = sys.modules[type(module).__module__].eager_attention_forward
        place = self.cache.place_of(key)
        dropped = self.dropped.get(place)
        if dropped is not None and key.shape[2] > self.prompt_length:
            attention_mask = self._hide(query, key, attention_mask, dropped)
            self.hidden.add(place)
        output = eager(module, query, key, value, attention_mask, **kwargs)
        if key.shape[2] == self.prompt_length and len(output) > 1 and output[1] is not None:
            rows = output[1][0, :, -self.window :, : self.prompt_length].detach().float()
            if place in self.weights:
                self.readers.setdefault(place, []).append(rows)
            else:
                self.weights[place] = rows
        return output

    def _hide(self, query: Tensor, key: Tensor, mask: Tensor | None, dropped: Tensor) -> Tensor:
        heads, rows, columns = query.shape[1], query.shape[2], key.shape[2]
        least = torch.finfo(query.dtype).min
        whole = query.new_zeros(1, heads, rows, columns)
        if mask is not None:
            mask = mask[..., :columns]
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, least)
            whole = whole + mask
        repeated = dropped.repeat_interleave(heads // dropped.shape[0], dim=0)
        whole[0, :, :, : self.prompt_length].masked_fill_(repeated[:, None], least)
        return whole


def use(model: Any, reference: Reference) -> None:
    """Let the model attend through the reference."""
    AttentionInterface.register(NAME, reference.attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(NAME)
