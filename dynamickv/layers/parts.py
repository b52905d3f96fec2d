"""Layers made of several: heads that hold different positions, and the same layer of several
caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamickv.layers.kv import AfterAttention, KVLayer
from dynamickv.records import Heads


class HeadwiseLayer(KVLayer):  # type: ignore[no-untyped-call]
    """A layer whose heads hold different positions: one `KVLayer` of one head for each."""

    def __init__(
        self, index: int, heads: Sequence[KVLayer], after_attention: AfterAttention | None = None
    ) -> None:
        super().__init__(index, after_attention)
        self.heads = heads
        self.seen = heads[0].seen
        self.is_initialized = True

    @classmethod
    def split(cls, layer: KVLayer, num_heads: int) -> HeadwiseLayer:
        """A whole layer's heads on their own; more than it stores are repeated."""
        keys, values = layer.held()
        heads = []
        for place in stored_heads(num_heads, keys.shape[1]):
            head = KVLayer(layer.index)
            head.hold(keys[:, place : place + 1], values[:, place : place + 1], layer.seen)
            heads.append(head)
        return cls(layer.index, heads, layer.after_attention)

    @property
    def length(self) -> int:
        """Positions the fullest head holds."""
        return max(head.length for head in self.heads)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(head.nbytes for head in self.heads)

    @property
    def reserved_bytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(head.reserved_bytes for head in self.heads)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to every head, where the attention function then finds them."""
        self.append(key_states, value_states)
        return self._tagged(key_states, value_states)

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold them behind what every head holds."""
        places = stored_heads(len(self.heads), key_states.shape[1])
        for place, head in zip(places, self.heads, strict=True):
            head.append(key_states[:, place : place + 1], value_states[:, place : place + 1])
        self.seen += key_states.shape[2]

    def keep(self, positions: Heads) -> None:
        """Drop every position but these, one (kept,) per head."""
        for head, kept in zip(self.heads, positions, strict=True):
            head.keep(kept.unsqueeze(0))
        self.chosen = max(head.chosen for head in self.heads)

    @property
    def removable(self) -> int:
        """Last positions that `crop` may remove."""
        return min(head.removable for head in self.heads)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many of the last positions of every head."""
        for head in self.heads:
            head.crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)


def stored_heads(num_heads: int, stored: int) -> list[int]:
    """The stored head that each of `num_heads` heads reads."""
    return [head * stored // num_heads for head in range(num_heads)]


class BatchedLayer(KVLayer):  # type: ignore[no-untyped-call]
    """The same layer of several caches that have seen as much, each of its parts in so many `rows`
    of the batch."""

    def __init__(self, parts: Sequence[KVLayer], rows: Sequence[int]) -> None:
        super().__init__(parts[0].index)
        self.parts, self.rows = parts, list(rows)
        self.seen = parts[0].seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append its rows to each part, where the attention function then finds them."""
        self.append(key_states, value_states)
        return self._tagged(key_states, value_states)

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold its rows behind what each part holds."""
        states = torch.split(key_states, self.rows), torch.split(value_states, self.rows)
        for part, keys, values in zip(self.parts, *states, strict=True):
            part.append(keys, values)
        self.seen += key_states.shape[2]
