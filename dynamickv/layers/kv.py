"""One layer's part of a KV cache: what each kind of layer holds.

A layer stores what it keeps in a preallocated buffer and remembers how many positions it has seen,
which is the next token's position however much was dropped. Decides nothing about what to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dynamickv.records import Attended, Heads

BLOCK = 128
"""Tokens by which a full buffer grows."""

AfterAttention = Callable[["KVLayer", Attended], None]
"""Called once a layer's attention is computed, with what it read."""

_updated: ContextVar[ReferenceType[KVLayer] | None] = ContextVar("updated", default=None)
"""The layer that grew last in this thread, until its attention is computed: models that make keys
anew from what they cache (a latent, say) lose the tag that `update` puts on them."""


def attended_layer(key: Tensor, place: int | None) -> tuple[KVLayer | None, bool]:
    """The cache layer whose keys an attention reads, None where it is none of ours; and whether it
    grew for this attention, rather than for an earlier layer or part that shares it.

    Args:
        key: what the attention function was given.
        place: the attention module's layer, where it knows it.
    """
    grown = _updated.get()
    last = None if grown is None else grown()
    if grown is not None:
        _updated.set(None)
    tagged: KVLayer | None = getattr(key, "kv_layer", None)
    if tagged is not None:
        return tagged, tagged is last
    return (last, True) if last is not None and place in (None, last.index) else (None, False)


class KVLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, (1, heads, length, head_dim), in position order."""

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int, after_attention: AfterAttention | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.after_attention = after_attention
        self.seen = 0
        """Positions that went through this layer, kept or not."""
        self.chosen = 0
        """Of those held, positions that a choice was made about; the rest follow them."""
        self.limit: int | None = None
        """Most positions that memory is taken for; None: as many as come."""
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
        self.show(keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values held, tagged with this layer for the attention
        function: in the format of what came, whatever they are held in."""
        self.append(key_states, value_states)
        keys, values = self.held()
        return self._tagged(keys.to(key_states.dtype), values.to(value_states.dtype))

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold (1, heads, n, head_dim) tensors behind what is held, in its format."""
        new = key_states.shape[2]
        if self.keys is None or self.values is None or self._buffers is None:
            self.hold(key_states, value_states, new)
            return
        group = self.keys.shape[1] // key_states.shape[1]
        if group > 1:
            key_states = key_states.repeat_interleave(group, dim=1)
            value_states = value_states.repeat_interleave(group, dim=1)
        start = self.advance(new)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The memory of keys and values, (1, heads, room, head_dim): the first positions of it are
        held."""
        assert self._buffers is not None
        return self._buffers

    def advance(self, new: int) -> int:
        """Hold so many positions more, for someone who writes them into `buffers`; the place of the
        first of them."""
        assert self.keys is not None
        assert self.values is not None
        start = self.length
        if start + new > self.buffers[0].shape[2]:
            room = -(-new // BLOCK) * BLOCK
            if self.limit is not None:
                room = max(new, min(room, self.limit - start))
            self._buffers = (_roomy(self.keys, room), _roomy(self.values, room))
        self.show(start + new)
        self.seen += new
        return start

    def _tagged(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same, for the attention function to know this layer by."""
        # A fresh view carries the tag, so that the stored tensors do not point back here.
        tagged = keys.view_as(keys)
        tagged.kv_layer = self  # type: ignore[attr-defined]
        _updated.set(ref(self))
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
        self.choose(positions)
        self.show(positions.shape[1])

    def rows_held(self) -> list[tuple[Tensor, Tensor]]:
        """For every row the keys that it holds, (heads, held, head_dim), and where they stand,
        counted from its first token, (heads, held)."""
        keys, _ = self.held()
        positions = self.held_positions()
        if positions is None:
            every = torch.arange(self.length, device=keys.device)
            return [(keys[0], every.expand(keys.shape[1], -1))]
        return [(keys[0], positions[0])]

    def keep_places(self, rows: Sequence[Tensor], room: int) -> None:
        """Of what is held keep these places, (heads, kept) ascending for every row, with memory for
        `room` more positions, and drop the rest."""
        (places,) = rows
        ((keys, positions),) = self.rows_held()
        _, values = self.held()
        self._buffers = (gather(keys, places, room), gather(values[0], places, room))
        self.choose(positions.gather(1, places))
        self.show(places.shape[1])

    def choose(self, positions: Tensor) -> None:
        """Remember that these positions, (heads, kept), are what is held."""
        self._positions = positions
        self.chosen = positions.shape[1]

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
            self.show(keys.shape[2])
        for buffer in self._buffers:
            buffer[:, :, self.length :].zero_()
        return self._buffers

    def grow_in_place(self) -> None:
        """Count one more position, which was written into the buffers."""
        self.show(self.length + 1)
        self.seen += 1

    def show(self, length: int) -> None:
        """Hold the first `length` positions of the buffers."""
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def get_seq_length(self) -> int:
        """Positions seen: the position of the next token."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) a mask for this layer would cover: all positions seen, kept or not, as
        models that reckon with distances need; the attention function makes its own."""
        return self.seen + query_length, 0

    def held_positions(self) -> Tensor | None:
        """Where what is held stood as it was fed, (rows, heads, length); None where nothing was
        dropped."""
        if self._positions is None:
            return None
        kept = self._positions
        later = torch.arange(self.seen - self.removable, self.seen, device=kept.device)
        return torch.cat([kept, later.expand(kept.shape[0], -1)], dim=1)[None]

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    @property
    def removable(self) -> int:
        """Last positions that `crop` may remove: those that no choice was made about."""
        return self.length - self.chosen

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many (given as a negative number) of the last positions, as drafts that were
        not confirmed are removed.

        Raises:
            ValueError: they are not all later than what was compressed.
        """
        count = abs(tokens_to_remove)
        if count > self.removable:
            raise ValueError(
                f"layer {self.index} cannot give back {count} positions, it holds {self.removable} "
                "after the compressed prompt; remove no more than was fed since"
            )
        if count:
            self.show(self.length - count)
            self.seen -= count

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: rows are made before the prompt is read."""
        raise ValueError(
            f"a compressed cache cannot be copied into {repeats} rows; feed the prompt in as many "
            "rows, as num_return_sequences does"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused, as choosing among rows is."""
        self.reorder_cache(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beams would each need the others' choices."""
        raise ValueError(
            "beam search exchanges the rows of a compressed cache; use num_beams=1 or sampling"
        )

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.keys = self.values = self._buffers = self._positions = None
        self.seen = self.chosen = 0
        self.limit = None
        self.is_initialized = False


def gather(states: Tensor, kept: Tensor, room: int) -> Tensor:
    """Rows `kept` (heads, count) of (num_kv_heads, n, head_dim) -> (1, heads, count + room,
    head_dim), room unset; one row of `kept` serves all heads."""
    num_kv_heads, length, head_dim = states.shape
    if kept.shape[0] < num_kv_heads:
        kept = kept.expand(num_kv_heads, -1)
    heads, count = kept.shape
    buffer = torch.empty(heads, count + room, head_dim, dtype=states.dtype, device=states.device)
    group = heads // num_kv_heads
    if count == length:
        buffer[:, :count] = states if group == 1 else states.repeat_interleave(group, dim=0)
        return buffer.unsqueeze(0)
    if states.is_cuda and group == 1:
        gather_at_once(states, kept, buffer[:, :count])
        return buffer.unsqueeze(0)
    for head in range(heads):
        torch.index_select(states[head // group], 0, kept[head], out=buffer[head, :count])
    return buffer.unsqueeze(0)


def gather_at_once(states: Tensor, kept: Tensor, out: Tensor) -> None:
    """Rows `kept`, (heads, count), of (heads, n, head_dim) into `out`, the first ones of a
    contiguous (heads, at least count, head_dim), in one launch instead of one per head."""
    if _in_words(states):
        # Eight bytes at a time: the device takes a thread for every number it copies.
        states, out = states.view(torch.int64), out.view(torch.int64)
    torch.gather(states, 1, kept.unsqueeze(-1).expand(-1, -1, states.shape[2]), out=out)


def _in_words(states: Tensor) -> bool:
    """Whether every row begins and ends at a multiple of eight bytes."""
    *strides, last = states.stride()
    common = math.gcd(*strides, states.shape[-1], states.storage_offset())
    return last == 1 and common * states.element_size() % 8 == 0


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
