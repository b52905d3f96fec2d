"""Causal attention over a whole prompt in bfloat16 products, with sums and softmax in float32.

Where the CPU has matrix tiles (AMX), torch's own kernel does that; elsewhere it gains nothing from
bfloat16, and blocks of queries do. Blocks also give the attention that every position receives.
Knows tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dynamickv.fast.heads import Laid

ELEMENTS, TOGETHER = 3 * 2**19, 9 * 2**19
"""Attention weights of one head that are in memory at a time, and of several heads, which should
stay in the cache."""
ROWS = (32, 256)
"""Least and most queries in a block."""


def has_tiles() -> bool:
    """Whether the CPU has instructions for matrix tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scaling: float, *, mass: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of a prompt's tokens, or of its last ones, to those before them and to themselves.

    Args:
        queries: (num_query_heads, m, head_dim) float32, of the last m <= n positions.
        keys: (num_kv_heads, n, head_dim), float32 or bfloat16; query head h reads KV head
            h // group.
        values: as keys.
        scaling: factor on the query-key products.
        mass: also sum up what every position receives; in blocks on every CPU.

    Returns:
        (m, num_query_heads, head_dim) bfloat16, and (num_query_heads, n) float32 or None.
    """
    whole = queries.shape[1] == keys.shape[1]
    if has_tiles() and whole and not mass:
        context = F.scaled_dot_product_attention(
            queries.to(torch.bfloat16)[None],
            _centred(keys)[None],
            values.to(torch.bfloat16)[None],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        return context[0].transpose(0, 1), None
    return _in_blocks(queries, keys, values, scaling, mass)


def _middle(keys: Tensor) -> Tensor:
    """The mean of a head's keys. The same vector taken from all keys moves all logits of a query
    alike, which softmax does not see; what is left is smaller, and so is what rounding does to it
    (SageAttention, arXiv:2410.02367).
    """
    return keys.mean(dim=1, dtype=torch.float32)


def _centred(keys: Tensor) -> Tensor:
    """Keys less their mean, bfloat16."""
    return (keys.float() - _middle(keys)[:, None]).to(torch.bfloat16)


def _in_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, scaling: float, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries, and of the keys only what they see."""
    # Numba takes a second to load, which only who reads a prompt should wait for.
    from dynamickv.fast.heads import asked_in_groups

    num_query_heads = len(queries)
    num_kv_heads, length, _ = keys.shape
    group = num_query_heads // num_kv_heads
    # To base 2, which a factor on the queries costs nothing.
    asked, sizes = asked_in_groups(queries, scaling / math.log(2), group)
    asked, sizes = asked.flatten(1, 2), sizes.flatten(1, 2)
    received = torch.zeros(num_kv_heads, group, length) if mass else None
    attend: Callable[[_Asking, Tensor | None], Tensor]
    if has_tiles():
        keys, values = _centred(keys), values.to(torch.bfloat16)
        attend = partial(_by_torch, keys, values)
        lengths = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    else:
        from dynamickv.fast.heads import laid_out

        laid = laid_out(keys, values, _middle(keys))
        attend, lengths = partial(_by_microkernel, laid), laid.sizes
    # No product is greater than that of both lengths.
    bounds = sizes * lengths.amax(dim=1, keepdim=True)
    spoiled = None if bool(bounds.isfinite().all()) else _spoiled(queries, lengths)
    asking = _Asking(asked, bounds, spoiled, group, length - queries.shape[1])
    context = attend(asking, received)
    if spoiled is not None:
        wrong = spoiled.view(num_kv_heads, -1, group).transpose(0, 1).flatten(1)
        context.masked_fill_(wrong[..., None], torch.nan)
    return context, None if received is None else received.view(num_query_heads, length)


@dataclass(frozen=True, slots=True)
class _Asking:
    """Consecutive queries, those that read one KV head together."""

    asked: Tensor
    """As `causal.attend` takes them, and so the next."""
    bounds: Tensor
    spoiled: Tensor | None
    """Which rows are no numbers or see what is none, as bounds; None where no row does."""
    group: int
    before: int

    def of_heads(self, heads: slice) -> _Asking:
        """Of some KV heads."""
        spoiled = None if self.spoiled is None else self.spoiled[heads]
        return replace(self, asked=self.asked[heads], bounds=self.bounds[heads], spoiled=spoiled)

    def blocks(self, per_query: int) -> Iterator[tuple[slice, int]]:
        """Rows whose weights, so many for each query, are in memory at a time, and how many keys
        the last of them sees."""
        rows = self.asked.shape[1]
        each = self.block(per_query) * self.group
        for first in range(0, rows, each):
            last = min(first + each, rows)
            yield slice(first, last), self.before + last // self.group

    def block(self, per_query: int) -> int:
        """Queries in a block."""
        queries = self.asked.shape[1] // self.group
        return min(max(ELEMENTS // per_query, ROWS[0]), ROWS[1], queries)

    def counted(self, totals: Tensor, rows: slice) -> Tensor:
        """What every row's weights count for in the sums of the group's heads, (..., group, rows)
        bfloat16, from their sums, (..., rows)."""
        if self.spoiled is not None:
            totals = totals.masked_fill(self.spoiled[..., rows], torch.nan)
        members = torch.eye(self.group).repeat(1, totals.shape[-1] // self.group)
        return (members / totals[..., None, :]).to(torch.bfloat16)


def _by_microkernel(laid: Laid, asking: _Asking, received: Tensor | None) -> Tensor:
    """All rows in one pass, or where what is received is asked for, in blocks of some heads."""
    from dynamickv.fast.causal import attend

    group = asking.group
    if received is None:
        return attend(asking.asked, laid, asking.bounds, group, asking.before)[0]
    heads, _, dim = asking.asked.shape
    length = laid.length
    block = asking.block(group * length)
    some = max(TOGETHER // (group * block * length), 1)
    context = asking.asked.new_empty(asking.asked.shape[1] // group, heads, group, dim)
    for first in range(0, heads, some):
        own = slice(first, first + some)
        part = _received(asking.of_heads(own), laid.of_heads(own), received[own])
        context[:, own] = part.view(len(part), -1, group, dim)
    return context.flatten(1, 2)


def _received(asking: _Asking, laid: Laid, received: Tensor) -> Tensor:
    """Attention of some heads' rows; what every position got of them is added to `received`."""
    from dynamickv.fast.causal import attend
    from dynamickv.fast.microkernel import COLUMNS

    asked, group = asking.asked, asking.group
    heads, rows, dim = asked.shape
    per_query = group * laid.length
    context = asked.new_empty(rows // group, heads * group, dim)
    # Written over for every block: fresh memory costs as much time as the weights.
    room = asked.new_empty(heads * group * asking.block(per_query) * laid.room)
    for part, end in asking.blocks(per_query):
        first, count = part.start // group, part.stop - part.start
        seen = -(-end // COLUMNS) * COLUMNS
        weights = room[: heads * count * seen].view(heads, count, seen)
        before = asking.before + first
        weights[:, :, before:] = 0
        given = asked[:, part].contiguous(), laid, asking.bounds[:, part].contiguous()
        context[first : part.stop // group], totals = attend(*given, group, before, weights)
        # As a product: many times faster than a sum over rows, and summed in float32.
        received[:, :, :end] += torch.bmm(asking.counted(totals, part), weights)[..., :end]
    return context


def _by_torch(keys: Tensor, values: Tensor, asking: _Asking, received: Tensor | None) -> Tensor:
    """In torch's products, which matrix tiles make faster than the microkernel's: so much that it
    pays to have the logits in memory."""
    from dynamickv.fast.softmax import causal_exponentials, divided

    asked, group = asking.asked, asking.group
    heads, length, _ = keys.shape
    per_query = group * length
    attended, totals = torch.empty_like(asked), torch.empty_like(asking.bounds)
    room = asked.new_empty(per_query * asking.block(per_query))
    for head in range(heads):
        own = asking.of_heads(slice(head, head + 1))
        for part, end in own.blocks(per_query):
            count = part.stop - part.start
            weights = room[: count * end].view(count, end)
            torch.mm(asked[head, part], keys[head, :end].t(), out=weights)
            total, start = totals[head, part], asking.before + part.start // group
            causal_exponentials(weights, asking.bounds[head, part], total, start, group)
            if received is not None:
                counted = own.counted(total[None], part)[0]
                received[head, :, :end] += torch.mm(counted, weights)
            torch.mm(weights, values[head, :end], out=attended[head, part])
    return divided(attended, totals, group)


def _spoiled(queries: Tensor, lengths: Tensor) -> Tensor:
    """Which queries are no numbers or see keys that are none, (num_kv_heads, m * group): what is
    compiled would not say so."""
    heads, asking = len(lengths), queries.shape[1]
    own = ~queries.isfinite().all(dim=-1)
    seen = (~lengths.isfinite()).cumsum(dim=1)[:, -asking:] > 0
    return (own.view(heads, -1, asking) | seen[:, None]).transpose(1, 2).flatten(1)
