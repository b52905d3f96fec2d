"""What one layer's attention read, and what of it a method may look at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from dynamickv.scoring import attention_shares, moments, unlikeness

RECALLED = 4
"""Attentions that a `RecallingLayer` keeps: one takes a few per cent of the layer's keys and
values."""
Piece = tuple[int, int]
"""Queries from so many tokens before the prompt's end to so many."""
QUERIES_AT_ONCE = 8
"""Queries that a CPU sums up together; what they paid, kept, is part of every longer window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What one layer's attention read in one pass, with the batch dimension models have."""

    queries: Tensor
    """Post-RoPE, (rows, num_query_heads, new tokens, head_dim)."""
    keys: Tensor
    """As the attention read them, (rows, heads, positions, head_dim)."""
    scaling: float
    values: Tensor | None = None
    """As the attention read them, (rows, heads, positions, value_dim)."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """(num_query_heads,), or of every query, (rows, num_query_heads, new tokens, 1)."""
    bias: Tensor | None = None
    """Added to the logits, (rows, num_query_heads, new tokens, positions)."""

    def row(
        self,
        row: int,
        stored_heads: int,
        *,
        tail: int,
        first: int = 0,
        last: int | None = None,
        earlier: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> LayerObservation:
        """One row's observation.

        Args:
            stored_heads: heads that the cache stores.
            tail: how many of the last queries it needs.
            first: where its prompt begins, after padding.
            last: where its prompt ends; by default with the positions.
            earlier: queries of earlier passes over the same prompt, (num_query_heads, any number,
                head_dim).
            mass: the attention its positions received from all queries.
        """
        positions, new = self.keys.shape[2], self.queries.shape[2]
        end = positions if last is None else last
        queries = self.queries[row, :, : new - (positions - end)]
        queries = queries[:, -tail:] if end - first > tail else queries[:, -(end - first) :]
        if earlier is not None and queries.shape[1] < tail:
            queries = torch.cat([earlier, queries], dim=1)[:, -tail:]
        keys = self.keys[row, :, first:end]
        return LayerObservation(
            queries=queries,
            keys=keys,
            scaling=self.scaling,
            values=None if self.values is None else self.values[row, :, first:end],
            mass=mass,
            softcap=self.softcap,
            sinks=self._sinks(row, end, queries.shape[1]),
            bias=self._bias(row, end, first, queries.shape[1]),
            stored_heads=None if stored_heads == keys.shape[0] else stored_heads,
        )

    def sinks_of(self, row: int) -> Tensor | None:
        """The sinks of one row's queries."""
        return self.sinks if self.sinks is None or self.sinks.dim() == 1 else self.sinks[row]

    def _sinks(self, row: int, end: int, tail: int) -> Tensor | None:
        """The sinks of a row's last `tail` queries before `end`."""
        if self.sinks is None or self.sinks.dim() == 1:
            return self.sinks
        behind = self.keys.shape[2] - end
        return self.sinks[row, :, : self.sinks.shape[2] - behind][:, -tail:].clone()

    def _bias(self, row: int, end: int, first: int, tail: int) -> Tensor | None:
        """The bias of a row's last `tail` queries before `end`."""
        if self.bias is None:
            return None
        behind = self.keys.shape[2] - end
        asked = self.bias[row, :, : self.bias.shape[2] - behind, first:end]
        if asked.shape[1] < tail:
            raise ValueError(
                "this model adds a bias by distance to its attention logits, and a prompt read in "
                "chunks does not keep it; leave out prefill_chunk_size"
            )
        return asked[:, -tail:].clone()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerObservation:
    """What one attention layer saw of the prompt; all a method may look at."""

    queries: Tensor
    """Post-RoPE queries of the last positions, (num_query_heads, tail, head_dim); tail <= prompt
    length."""
    keys: Tensor
    """Post-RoPE keys of the whole prompt, (num_kv_heads, prompt_length, head_dim)."""
    scaling: float
    """Factor on query-key products, usually head_dim ** -0.5."""
    values: Tensor | None = None
    """Values of the whole prompt, (num_kv_heads, prompt_length, value_dim), when recorded."""
    mass: Tensor | None = None
    """Attention each position received from all queries, (num_query_heads, prompt_length), float32,
    when recorded."""
    softcap: float | None = None
    """Bound that the layer puts on its logits: softcap * tanh(logits / softcap)."""
    sinks: Tensor | None = None
    """Learned logits that take part in the softmax and lead nowhere, (num_query_heads,), or one for
    each of `queries`, (num_query_heads, tail, 1)."""
    bias: Tensor | None = None
    """Added to the logits of `queries`, (num_query_heads, tail, prompt_length)."""
    stored_heads: int | None = None
    """Heads that the cache stores, where keys are made anew from it: 1 for a latent."""

    @property
    def prompt_length(self) -> int:
        """Tokens in the prompt."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads that the cache stores, for which positions are chosen; query heads are a multiple
        of them."""
        return self.keys.shape[0] if self.stored_heads is None else self.stored_heads

    @property
    def num_query_heads(self) -> int:
        """Query heads."""
        return self.queries.shape[0]

    def attention(self, first: int, last: int = 0) -> Tensor:
        """Attention mass that the queries from `first` to `last` tokens before the prompt's end pay
        to each position before them, (num_query_heads, prompt_length - first) float32.

        `attention(window_size)` is what the observation window pays to the prefix.
        """
        columns = self.prompt_length - first
        added, taken = self._pieces(first, last)
        total = reduce(torch.add, (self._paid(far, near, columns) for far, near in added))
        for far, near in taken:
            # Attention is never less than none, whatever rounding leaves.
            total = (total - self._paid(far, near, columns)).clamp_(min=0)
        return total.contiguous()

    def _pieces(self, first: int, last: int) -> tuple[list[Piece], list[Piece]]:
        """The queries from `first` to `last` in pieces, those that are summed up, the last ones
        first, and those whose part is taken off again: of more than half a piece, the rest."""
        # An accelerator would spend its time on starting the small operations.
        at_once = QUERIES_AT_ONCE if self.keys.device.type == "cpu" else first
        whole = -(-first // at_once) * at_once
        more = whole - first
        end = whole if more < at_once / 2 and whole <= self.queries.shape[1] else first
        ends = [*range(last - last % at_once + at_once, end, at_once), end]
        return list(zip(ends, [last, *ends], strict=False)), [(end, first)] if end > first else []

    def _paid(self, first: int, last: int, columns: int) -> Tensor:
        """What the queries from `first` to `last` pay to each of the first positions,
        (num_query_heads, columns)."""
        shares = self._shares(first, last)
        if self.keys.device.type != "cpu":
            return shares[..., :columns].sum(dim=1)
        # All are summed, as for longer windows, so that what is kept is the same to the last bit.
        return shares.sum(dim=1)[:, :columns]

    def moments(self, first: int) -> Tensor:
        """Mean, variance and dispersion of the attention of the last `first` queries, (3,
        num_query_heads, prompt_length - first) float32; see `scoring.moments`."""
        return moments(self._before(first))

    def peaks(self, first: int) -> Tensor:
        """The most attention that one of the last `first` queries pays to each position before
        them, (num_query_heads, prompt_length - first) float32."""
        return self._before(first).amax(dim=1)

    def unlikeness(self) -> Tensor:
        """Negative cosine between each key and the mean of all normalised keys, (heads,
        prompt_length) float32; see `scoring.unlikeness`."""
        return unlikeness(self.keys)

    def value_sizes(self) -> Tensor:
        """L1 norms of the values, which must be recorded, (heads, prompt_length) float32."""
        assert self.values is not None
        sizes: Tensor = torch.linalg.vector_norm(self.values, ord=1, dim=-1, dtype=torch.float32)
        return sizes

    def _before(self, first: int) -> Tensor:
        """The shares of the last `first` queries, of the positions before them."""
        return self._shares(first, 0)[..., : self.prompt_length - first]

    def _shares(self, first: int, last: int) -> Tensor:
        """`attention_shares` of the queries from `first` to `last`."""
        end = self.queries.shape[1] - last
        queries = self.queries[:, end - (first - last) : end]
        keys = self.keys[:, : self.prompt_length - last]
        bias = self.bias
        if bias is not None:
            bias = bias[:, end - (first - last) : end, : keys.shape[1]]
        sinks = self.sinks
        if sinks is not None and sinks.dim() > 1:
            sinks = sinks[:, end - (first - last) : end]
        return attention_shares(queries, keys, self.scaling, self.softcap, sinks, bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallingLayer(LayerObservation):
    """A layer that keeps the attentions it was asked for last, so that choosing again is quick.

    They depend on the window alone: any capacity, kernel or allocation follows from them.
    """

    recalled: OrderedDict[tuple[int, int | str], Tensor] = field(
        default_factory=OrderedDict, compare=False, repr=False
    )

    pieces: dict[Piece, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What whole pieces of the queries paid, which longer windows are summed up from."""

    def attention(self, first: int, last: int = 0) -> Tensor:
        """The same tensor as `LayerObservation.attention`, computed once; not to be changed."""
        return self._recall((first, last), lambda: LayerObservation.attention(self, first, last))

    def moments(self, first: int) -> Tensor:
        """The same tensor as `LayerObservation.moments`, computed once; not to be changed."""
        return self._recall((first, "moments"), lambda: LayerObservation.moments(self, first))

    def peaks(self, first: int) -> Tensor:
        """The same tensor as `LayerObservation.peaks`, computed once; not to be changed."""
        return self._recall((first, "peaks"), lambda: LayerObservation.peaks(self, first))

    def unlikeness(self) -> Tensor:
        """The same tensor as `LayerObservation.unlikeness`, computed once; not to be changed."""
        return self._recall((0, "unlikeness"), lambda: LayerObservation.unlikeness(self))

    def value_sizes(self) -> Tensor:
        """The same tensor as `LayerObservation.value_sizes`, computed once; not to be changed."""
        return self._recall((0, "value sizes"), lambda: LayerObservation.value_sizes(self))

    def _recall(self, key: tuple[int, int | str], compute: Callable[[], Tensor]) -> Tensor:
        # Taken out and put back, so that threads which ask at once never find it half done.
        found = self.recalled.pop(key, None)
        if found is None:
            found = compute()
        self.recalled[key] = found
        while _planes(self.recalled.values()) > RECALLED:
            self.recalled.popitem(last=False)
        return found

    @property
    def whole_pieces(self) -> list[Piece]:
        """The pieces that are kept: none on an accelerator, which sums up a window at once."""
        if self.keys.device.type != "cpu":
            return []
        whole = self.queries.shape[1] // QUERIES_AT_ONCE * QUERIES_AT_ONCE
        return self._pieces(whole, 0)[0] if whole else []

    def prepare(self) -> None:
        """Sum up what every piece of the queries paid, so that any window is quick."""
        for first, last in self.whole_pieces:
            self._paid(first, last, 0)

    def _paid(self, first: int, last: int, columns: int) -> Tensor:
        if (first, last) not in self.whole_pieces:
            return LayerObservation._paid(self, first, last, columns)
        found = self.pieces.get((first, last))
        if found is None:
            # Shorter windows read the positions of longer ones' queries.
            found = LayerObservation._paid(self, first, last, self.prompt_length - last)
            self.pieces[first, last] = found
        return found[:, :columns]


def _planes(recalled: Iterable[Tensor]) -> int:
    """How many tensors of a value per query head and position these are; moments are three."""
    return sum(len(found) if found.dim() == 3 else 1 for found in list(recalled))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLayer(LayerObservation):
    """What one layer holds while the answer grows, for a choice among it. A place stands for
    whatever position it holds: `prompt_length` counts places, of `keys` and `mass` alike."""

    positions: Tensor
    """Where what is held stands in prompt and answer, (num_kv_heads, places) ascending; the last
    ones are held by every head."""

    @property
    def seen(self) -> int:
        """Positions so far, held or not."""
        return int(self.positions[0, -1]) + 1

    def attention(self, first: int, last: int = 0) -> Tensor:
        """As `LayerObservation.attention`, over what is held now: (num_query_heads, places -
        first). A query sees what stands at or before its own position."""
        end = self.queries.shape[1] - last
        queries = self.queries[:, end - (first - last) : end]
        asked = torch.arange(self.seen - first, self.seen - last, device=self.keys.device)
        visible = self.positions[:, None, :] <= asked[:, None]
        visible = visible.repeat_interleave(self.num_query_heads // len(visible), dim=0)
        shares = attention_shares(
            queries, self.keys, self.scaling, self.softcap, self.sinks, visible=visible
        )
        return shares[..., : self.prompt_length - first].sum(dim=1)
