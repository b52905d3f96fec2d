"""Layers that hold several prompts at once, each row its own positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from dynamickv.layers.kv import BLOCK, AfterAttention, KVLayer, gather
from dynamickv.layers.other import HybridLayer


class RowsLayer(KVLayer):  # type: ignore[no-untyped-call]
    """A layer of several prompts at once, (rows, heads, length, head_dim): every row keeps its own
    positions. Rows end together; one that holds less than others has unused slots before them."""

    def __init__(
        self, index: int, padding: Tensor, after_attention: AfterAttention | None = None
    ) -> None:
        super().__init__(index, after_attention)
        self.padding = padding
        """Slots before each row's first token as it is fed, (rows,)."""
        self._rows: list[Tensor] | None = None
        self._unused: Tensor | None = padding if bool(padding.any()) else None
        self._added: Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[KVLayer]) -> RowsLayer:
        """A copy of what layers of one row each hold, of as many heads, that have seen as much."""
        first, longest = layers[0], max(layer.length for layer in layers)
        rows = cls(first.index, torch.zeros(len(layers), dtype=torch.long))
        rows.lazy_initialization(*first.held())
        keys, values = (
            # Behind the longest there is room to grow.
            torch.cat([F.pad(held, (0, 0, longest - held.shape[2], BLOCK)) for held in states])
            for states in zip(*(layer.held() for layer in layers), strict=True)
        )
        rows._buffers = keys, values
        rows._rows = [layer.rows_held()[0][1] for layer in layers]
        if any(layer.length < longest for layer in layers):
            unused = [longest - layer.length for layer in layers]
            rows._unused = torch.tensor(unused, device=keys.device)
        rows.seen, rows.chosen = first.seen, longest
        rows.show(longest)
        return rows

    @property
    def unused(self) -> Tensor | None:
        """Slots before each row's first position, (rows,); None where all rows are equally long."""
        return self._unused

    def added(self, held: int, dtype: torch.dtype) -> Tensor | None:
        """What new tokens add to their logits over the first `held` slots, (rows, 1, 1, held): 0,
        and the least number where a slot is unused. None where all are used."""
        if self._unused is None:
            return None
        if self._added is None or self._added.shape[3] < held or self._added.dtype != dtype:
            # Made for later tokens too. CUDA's attention copies a mask of other than round length.
            room = (held // BLOCK + 2) * BLOCK
            unused = torch.arange(room, device=self._unused.device) < self._unused[:, None]
            zeros = torch.zeros(unused.shape, dtype=dtype, device=unused.device)
            self._added = zeros.masked_fill_(unused, torch.finfo(dtype).min)[:, None, None]
        return self._added[..., :held]

    def _tagged(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the slots that are unused in these very keys: layers that share them may
        read them after this one was cut."""
        tagged, values = super()._tagged(keys, values)
        tagged.kv_unused = self._unused  # type: ignore[attr-defined]
        return tagged, values

    def keep_rows(self, positions: Sequence[Tensor]) -> None:
        """Drop every position but these, one (heads, kept) ascending for each row."""
        keys, values = self.held()
        places = []
        for row, kept in enumerate(positions):
            if self._rows is None:
                places.append(kept + self.padding[row])
            else:
                before, unused = self._rows[row], keys.shape[2] - self._rows[row].shape[1]
                places.append(torch.searchsorted(before, kept.contiguous()) + unused)
        self._fill(keys, values, places, list(positions))

    def _fill(
        self, keys: Tensor, values: Tensor, places: list[Tensor], kept: list[Tensor], room: int = 0
    ) -> None:
        """Hold these slots of every row, which stand for the positions `kept`."""
        longest = max(held.shape[1] for held in kept)
        self._buffers = (
            _gathered(keys, places, longest, room),
            _gathered(values, places, longest, room),
        )
        self._rows = kept
        unused = [longest - held.shape[1] for held in kept]
        self._unused = torch.tensor(unused, device=keys.device) if any(unused) else None
        self._added = None
        self.show(longest)
        self.chosen = longest

    def rows_held(self) -> list[tuple[Tensor, Tensor]]:
        """As `KVLayer` does, without unused slots."""
        keys, _ = self.held()
        positions = self.held_positions()
        if positions is None:
            every = torch.arange(self.length, device=keys.device)
            positions = every.expand(*keys.shape[:2], -1)
        return [
            (keys[row, :, start:], positions[row, :, start:] - int(self.padding[row]))
            for row, start in enumerate(self._starts())
        ]

    def keep_places(self, rows: Sequence[Tensor], room: int) -> None:
        """As `KVLayer` does; rows end together."""
        keys, values = self.held()
        kept = [
            positions.gather(1, places)
            for (_, positions), places in zip(self.rows_held(), rows, strict=True)
        ]
        places = [place + start for place, start in zip(rows, self._starts(), strict=True)]
        self._fill(keys, values, places, kept, room)

    def _starts(self) -> list[int]:
        """Each row's first slot in use."""
        return [0] * len(self.padding) if self._unused is None else self._unused.tolist()

    def held_positions(self) -> Tensor | None:
        """As `KVLayer` does, padding counted; unused slots read 0."""
        if self._rows is None:
            return None
        keys, _ = self.held()
        rows, heads, length, _ = keys.shape
        positions = torch.zeros(rows, heads, length, dtype=torch.long, device=keys.device)
        for row, kept in enumerate(self._rows):
            first = self.chosen - kept.shape[1]
            positions[row, :, first : self.chosen] = kept + self.padding[row]
        positions[:, :, self.chosen :] = torch.arange(self.seen - self.removable, self.seen)
        return positions

    def reset(self) -> None:
        """Forget everything and free the memory."""
        super().reset()
        self._rows = None


class HybridRowsLayer(LinearAttentionLayer, RowsLayer):  # type: ignore[no-untyped-call,misc]
    """`HybridLayer` of several prompts."""

    is_compileable = False
    is_croppable = HybridLayer.is_croppable
    nbytes = HybridLayer.nbytes
    lazy_initialization = HybridLayer.lazy_initialization

    def __init__(
        self,
        index: int,
        padding: Tensor,
        after_attention: AfterAttention | None = None,
        states: int = 1,
    ) -> None:
        RowsLayer.__init__(self, index, padding, after_attention)
        LinearAttentionLayer.__init__(self, number_of_states=states)


def in_rows(layer: Any, padding: Tensor) -> Any:
    """A fresh layer of the same kind for several prompts, padded on the left by so many slots."""
    if type(layer) is KVLayer:
        return RowsLayer(layer.index, padding, layer.after_attention)
    if type(layer) is HybridLayer:
        return HybridRowsLayer(layer.index, padding, layer.after_attention, layer.number_of_states)
    return layer


def _gathered(states: Tensor, places: Sequence[Tensor], longest: int, room: int) -> Tensor:
    """Each row's `places`, (heads, kept), ending together in (rows, heads, longest + room, dim),
    behind them zeros."""
    rows, heads, _, dim = states.shape
    stored = max(heads, *(place.shape[0] for place in places))
    buffer = states.new_zeros(rows, stored, longest + room, dim)
    for row, place in enumerate(places):
        buffer[row, :, longest - place.shape[1] : longest] = gather(states[row], place, 0)[0]
    return buffer
