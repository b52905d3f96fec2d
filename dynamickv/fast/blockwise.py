"""Causal attention over a whole prompt in bfloat16 products, with sums and softmax in float32.

Where the CPU has matrix tiles (AMX), torch's own kernel does that; elsewhere it gains nothing from
bfloat16, and blocks of queries do. Blocks also give the attention that every position receives.
Knows tensors only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dynamickv.fast.causal import Held

ELEMENTS, TOGETHER = 3 * 2**19, 9 * 2**19
"""Attention weights of one head that are in memory at a time, and of several heads, which should
stay in the cache."""
ROWS = (32, 256)
"""Least and most queries in a block."""
MULTIPLE = 64
"""Keys that weights have room for come in as many."""


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
    narrow_keys = _centred(keys).to(torch.bfloat16)
    narrow_values = values.to(torch.bfloat16)
    whole = queries.shape[1] == keys.shape[1]
    if has_tiles() and whole and not mass:
        context = F.scaled_dot_product_attention(
            queries.to(torch.bfloat16)[None],
            narrow_keys[None],
            narrow_values[None],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        return context[0].transpose(0, 1), None
    return _in_blocks(queries, narrow_keys, narrow_values, scaling, mass)


def _centred(keys: Tensor) -> Tensor:
    """The same vector taken from all keys moves all logits of a query alike, which softmax does not
    see; what is left is smaller, and so is what rounding does to it (SageAttention,
    arXiv:2410.02367).
    """
    keys = keys.float()
    return keys - keys.mean(dim=1, keepdim=True)


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
    # No product is greater than that of both lengths.
    bounds = sizes * keys.float().norm(dim=-1).amax(dim=1, keepdim=True)
    spoiled = None if bool(bounds.isfinite().all()) else _spoiled(queries, keys)
    received = torch.zeros(num_kv_heads, group, length) if mass else None
    way = _by_torch if has_tiles() else _by_microkernel
    context = way(asked, keys, values, bounds, group, spoiled, received)
    return context, None if received is None else received.view(num_query_heads, length)


def _block(queries: int, per_query: int) -> int:
    """Queries whose weights, so many for each, are held at a time."""
    return min(max(ELEMENTS // per_query, ROWS[0]), ROWS[1], queries)


def _by_microkernel(
    asked: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor,
    group: int,
    spoiled: Tensor | None,
    received: Tensor | None,
) -> Tensor:
    """All rows in one pass, or where what is received is asked for, in blocks of some heads."""
    from dynamickv.fast.causal import Held, attend

    heads, rows, dim = asked.shape
    if received is None:
        before = keys.shape[1] - rows // group
        context, _ = attend(asked, Held(keys, values), bounds, group, before)
    else:
        context = asked.new_empty(rows // group, heads, group, dim)
        block = _block(rows // group, group * keys.shape[1])
        some = max(TOGETHER // (group * block * keys.shape[1]), 1)
        for first in range(0, heads, some):
            own = slice(first, min(first + some, heads))
            wrong = None if spoiled is None else spoiled[own]
            given = asked[own], Held(keys[own], values[own]), bounds[own], block, wrong
            context[:, own] = _received(*given, received[own]).view(
                -1, own.stop - first, group, dim
            )
        context = context.flatten(1, 2)
    if spoiled is not None:
        wrong = spoiled.view(heads, -1, group).transpose(0, 1).flatten(1)
        context.masked_fill_(wrong[..., None], torch.nan)
    return context


def _received(
    asked: Tensor,
    held: Held,
    bounds: Tensor,
    block: int,
    spoiled: Tensor | None,
    received: Tensor,
) -> Tensor:
    """Attention of some heads' rows; what every position got of them is added to `received`."""
    from dynamickv.fast.causal import attend

    heads, rows, dim = asked.shape
    group = received.shape[1]
    before = held.length - rows // group
    context = asked.new_empty(rows // group, heads * group, dim)
    # Written over for every block: fresh memory costs as much time as the weights.
    room = asked.new_empty(heads * group * block * held.room)
    members = torch.eye(group).repeat(1, block)
    for first in range(0, rows // group, block):
        last = min(first + block, rows // group)
        part = slice(first * group, last * group)
        count, end = part.stop - part.start, before + last
        seen = -(-end // MULTIPLE) * MULTIPLE
        weights = room[: heads * count * seen].view(heads, count, seen)
        weights[:, :, before + first :] = 0
        given = asked[:, part].contiguous(), held, bounds[:, part].contiguous()
        context[first:last], totals = attend(*given, group, before + first, weights)
        if spoiled is not None:
            totals.masked_fill_(spoiled[:, part], torch.nan)
        # As a product: many times faster than a sum over rows, and summed in float32.
        counted = (members[:, :count] / totals[:, None]).to(torch.bfloat16)
        received[:, :, :end] += torch.bmm(counted, weights)[..., :end]
    return context


def _by_torch(
    asked: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor,
    group: int,
    spoiled: Tensor | None,
    received: Tensor | None,
) -> Tensor:
    """In torch's products, which matrix tiles make up to eight times as fast as the microkernel's:
    so much that it pays to have the logits in memory."""
    from dynamickv.fast.softmax import causal_exponentials, divided

    heads, rows, _ = asked.shape
    length = keys.shape[1]
    before = length - rows // group
    block = _block(rows // group, group * length)
    attended, totals = torch.empty_like(asked), torch.empty_like(bounds)
    members = torch.eye(group).repeat(1, block)
    room = asked.new_empty(group * block * length)
    for head in range(heads):
        columns = keys[head].t()
        for first in range(0, rows, block * group):
            part = slice(first, min(first + block * group, rows))
            count, end = part.stop - part.start, before + part.stop // group
            weights = room[: count * end].view(count, end)
            torch.mm(asked[head, part], columns[:, :end], out=weights)
            total = totals[head, part]
            causal_exponentials(weights, bounds[head, part], total, before + first // group, group)
            if spoiled is not None:
                total.masked_fill_(spoiled[head, part], torch.nan)
            if received is not None:
                counted = (members[:, :count] / total).to(torch.bfloat16)
                received[head, :, :end] += torch.mm(counted, weights)
            torch.mm(weights, values[head, :end], out=attended[head, part])
    return divided(attended, totals, group)


def _spoiled(queries: Tensor, keys: Tensor) -> Tensor:
    """Which queries are no numbers or see keys that are none, (num_kv_heads, m * group): what is
    compiled would not say so."""
    heads, asking = len(keys), queries.shape[1]
    own = ~queries.isfinite().all(dim=-1)
    seen = (~keys.isfinite().all(dim=-1)).cumsum(dim=1)[:, -asking:] > 0
    return (own.view(heads, -1, asking) | seen[:, None]).transpose(1, 2).flatten(1)
