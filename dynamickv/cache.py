"""KV caches whose layers may differ in length, with exact byte counts.

A layer stores what it keeps in a preallocated buffer and remembers how many positions it has seen,
which is the next token's position however much was dropped. Decides nothing about what to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from dynamickv.records import Heads, Prefill, Retention, SlidingState

BLOCK = 128
"""Tokens by which a full buffer grows."""

AfterAttention = Callable[["KVLayer", Tensor, float], None]
"""Called with (layer, queries, scaling) once a layer's attention is computed."""


class KVLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, (1, heads, length, head_dim), in position order."""

    is_sliding = False

    def __init__(self, index: int, after_attention: AfterAttention | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.after_attention = after_attention
        self.seen = 0
        """Positions that went through this layer, kept or not."""
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._positions: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return 0 if self.keys is None else int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    @property
    def reserved_bytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(t.numel() * t.element_size() for t in self._buffers or ())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated before the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def hold(self, keys: Tensor, values: Tensor, seen: int, room: int = 0) -> None:
        """Replace what is held by (1, heads, length, head_dim) tensors, with room for that many
        more positions."""
        self.lazy_initialization(keys, values)
        self.seen = seen
        if room == 0:
            self._buffers = (_owned(keys), _owned(values))
            self.keys, self.values = self._buffers
            return
        self._buffers = (_roomy(keys, room), _roomy(values, room))
        self._view(keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values held, tagged with this layer for the attention
        function."""
        new = key_states.shape[2]
        if self.keys is None or self.values is None or self._buffers is None:
            self.hold(key_states, value_states, new)
        else:
            group = self.keys.shape[1] // key_states.shape[1]
            if group > 1:
                key_states = key_states.repeat_interleave(group, dim=1)
                value_states = value_states.repeat_interleave(group, dim=1)
            length = self.length
            if length + new > self._buffers[0].shape[2]:
                room = -(-new // BLOCK) * BLOCK
                self._buffers = (_roomy(self.keys, room), _roomy(self.values, room))
            self._view(length + new)
            self.keys[:, :, length:] = key_states
            self.values[:, :, length:] = value_states
            self.seen += new
        keys, values = self.held()
        # A fresh view carries the tag, so that the stored tensors do not point back here.
        tagged = keys.view_as(keys)
        tagged.kv_layer = self  # type: ignore[attr-defined]
        return tagged, values

    def keep(self, positions: Heads) -> None:
        """Drop every position but these, (heads, kept) ascending, all of them held; frees the rest.

        More heads than are stored means one choice per query head: stored heads are repeated.
        """
        assert isinstance(positions, Tensor)
        keys, values = self.held()
        places = positions
        if self._positions is not None:
            if positions.shape == self._positions.shape:
                return
            places = torch.searchsorted(self._positions, positions.contiguous())
        self._buffers = (gather(keys[0], places, 0), gather(values[0], places, 0))
        self._positions = positions
        self._view(positions.shape[1])

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (1, heads, length, head_dim).

        Raises:
            RuntimeError: if nothing went through this layer yet.
        """
        if self.keys is None or self.values is None:
            raise RuntimeError(f"layer {self.index} holds nothing yet; run the model first")
        return self.keys, self.values

    def reserve(self, room: int) -> tuple[Tensor, Tensor]:
        """The buffers of keys and values, (1, heads, at least length + room, head_dim), for someone
        who writes the next positions in place; what is not held yet is zero."""
        keys, values = self.held()
        assert self._buffers is not None
        if self._buffers[0].shape[2] < self.length + room:
            self._buffers = (_roomy(keys, room), _roomy(values, room))
            self._view(keys.shape[2])
        for buffer in self._buffers:
            buffer[:, :, self.length :].zero_()
        return self._buffers

    def grow_in_place(self) -> None:
        """Count one more position, which was written into the buffers."""
        self._view(self.length + 1)
        self.seen += 1

    def _view(self, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def get_seq_length(self) -> int:
        """Positions seen: the position of the next token."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) a mask for this layer would cover."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.keys = self.values = self._buffers = self._positions = None
        self.seen = 0
        self.is_initialized = False


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
        for place in _stored_heads(num_heads, keys.shape[1]):
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
        places = _stored_heads(len(self.heads), key_states.shape[1])
        for place, head in zip(places, self.heads, strict=True):
            head.update(key_states[:, place : place + 1], value_states[:, place : place + 1])
        self.seen += key_states.shape[2]
        tagged = key_states.view_as(key_states)
        tagged.kv_layer = self  # type: ignore[attr-defined]
        return tagged, value_states

    def keep(self, positions: Heads) -> None:
        """Drop every position but these, one (kept,) per head."""
        for head, kept in zip(self.heads, positions, strict=True):
            head.keep(kept.unsqueeze(0))


def _stored_heads(num_heads: int, stored: int) -> list[int]:
    """The stored head that each of `num_heads` heads reads."""
    return [head * stored // num_heads for head in range(num_heads)]


class SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding-window layer, as transformers caches it; no method touches it."""

    def __init__(self, window: int, state: SlidingState | None = None, seen: int = 0) -> None:
        super().__init__(sliding_window=window)
        if state is not None:
            self.lazy_initialization(state.keys, state.values)
            self.keys, self.values = state.keys, state.values
            self.cumulative_length = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers does, without keeping a whole prompt alive behind a slice of it."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        state = self.state()
        if state.keys.shape[2] + 1 < keys.shape[2]:
            self.keys, self.values = state.keys.clone(), state.values.clone()
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return self.state().nbytes if self.is_initialized else 0

    def state(self) -> SlidingState:
        """What it holds now; later updates do not change it."""
        assert self.keys is not None
        assert self.values is not None
        return SlidingState(keys=self.keys, values=self.values, window=self.sliding_window)


class KVCache(Cache):
    """One layer cache per layer; what `model(..., past_key_values=)` takes.

    Args:
        windows: sliding-window layers by their place, with their window; the others are `KVLayer`s.
    """

    layers: list[KVLayer | SlidingLayer]  # type: ignore[assignment]

    def __init__(
        self,
        num_layers: int,
        after_attention: AfterAttention | None = None,
        windows: Mapping[int, int] | None = None,
    ) -> None:
        kinds = windows or {}
        super().__init__(
            layers=[
                SlidingLayer(kinds[index]) if index in kinds else KVLayer(index, after_attention)
                for index in range(num_layers)
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, summed from the tensors."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def plain(self) -> bool:
        """Whether in every layer all heads hold the same number of positions, and none slides."""
        return all(type(layer) is KVLayer for layer in self.layers)

    def whole_layers(self) -> list[KVLayer]:
        """The layers that attend to the whole prompt, in order."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def sliding(self) -> dict[int, SlidingState]:
        """What the sliding-window layers hold, by their place."""
        return {
            place: layer.state()
            for place, layer in enumerate(self.layers)
            if isinstance(layer, SlidingLayer)
        }


class BatchedLayer(KVLayer):  # type: ignore[no-untyped-call]
    """The same layer of several caches of one sequence each, of any lengths."""

    def __init__(self, rows: Sequence[KVLayer]) -> None:
        super().__init__(rows[0].index)
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append each row to its own cache, where the attention function then finds it."""
        for row, key, value in zip(self.rows, key_states, value_states, strict=True):
            row.update(key[None], value[None])
        tagged = key_states.view_as(key_states)
        tagged.kv_layer = self  # type: ignore[attr-defined]
        return tagged, value_states


class BatchedCache(Cache):
    """Several caches seen by the model as one batch; each row attends to its own cache alone."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        layers = zip(*(cache.whole_layers() for cache in caches), strict=True)
        super().__init__(layers=[BatchedLayer(rows) for rows in layers])


def prune(prefill: Prefill, retention: Retention, room: int) -> KVCache:
    """A cache of the retained positions, copied out of the prefill's, with room for `room` more
    tokens.

    With one choice per query head the layer stores query heads, each a copy of its KV head's rows.
    Sliding-window layers hold what they held after the prefill.
    """
    seen = prefill.length
    layers: dict[int, KVLayer | SlidingLayer] = {
        place: SlidingLayer(state.window, state, seen) for place, state in prefill.sliding.items()
    }
    for place, observation, values, kept in zip(
        prefill.compressed_layers, prefill.layers, prefill.values, retention.indices, strict=True
    ):
        keys = observation.keys
        if isinstance(kept, Tensor):
            layers[place] = _pruned(place, keys, values, kept, room, seen)
            continue
        stored = _stored_heads(len(kept), keys.shape[0])
        heads = [
            _pruned(place, keys[one : one + 1], values[one : one + 1], positions[None], room, seen)
            for one, positions in zip(stored, kept, strict=True)
        ]
        layers[place] = HeadwiseLayer(place, heads)
    cache = KVCache(0)
    cache.layers = [layers[place] for place in range(len(layers))]
    return cache


def _pruned(
    place: int, keys: Tensor, values: Tensor, kept: Tensor, room: int, seen: int
) -> KVLayer:
    layer = KVLayer(place)
    layer.hold(gather(keys, kept, room), gather(values, kept, room), seen)
    layer._view(kept.shape[1])
    return layer


def gather(states: Tensor, kept: Tensor, room: int) -> Tensor:
    """Rows `kept` (heads, count) of (num_kv_heads, n, head_dim) -> (1, heads, count + room,
    head_dim), room unset."""
    num_kv_heads, length, head_dim = states.shape
    heads, count = kept.shape
    buffer = torch.empty(heads, count + room, head_dim, dtype=states.dtype, device=states.device)
    group = heads // num_kv_heads
    if count == length:
        buffer[:, :count] = states if group == 1 else states.repeat_interleave(group, dim=0)
        return buffer.unsqueeze(0)
    if states.is_cuda and group == 1:
        # One launch instead of one per head.
        places = kept.unsqueeze(-1).expand(-1, -1, head_dim)
        torch.gather(states, 1, places, out=buffer[:, :count])
        return buffer.unsqueeze(0)
    for head in range(heads):
        torch.index_select(states[head // group], 0, kept[head], out=buffer[head, :count])
    return buffer.unsqueeze(0)


def _owned(states: Tensor) -> Tensor:
    """The states in memory that holds nothing else.

    On CUDA in whatever order the model left them, where they fill their memory: copying all keys
    and values costs about as much time as choosing among them.
    """
    filled = states.untyped_storage().nbytes() == states.numel() * states.element_size()
    return states if states.is_cuda and filled else states.contiguous()


def _roomy(states: Tensor, room: int) -> Tensor:
    """A copy with `room` unset positions behind."""
    batch, heads, length, head_dim = states.shape
    buffer = torch.empty(
        batch, heads, length + room, head_dim, dtype=states.dtype, device=states.device
    )
    buffer[:, :, :length] = states
    return buffer
