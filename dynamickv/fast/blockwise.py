"""Causal attention over a whole prompt in bfloat16 products, with sums and softmax in float32.

Where the CPU has matrix tiles (AMX), torch's own kernel does that; elsewhere it gains nothing from
bfloat16, and blocks of queries do. Blocks also give the attention that every position receives.
Knows tensors only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 9 * 2**19
"""Attention weights held at a time where they are summed up, which should stay in the cache."""
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
    from dynamickv.fast.causal import Held, attend
    from dynamickv.fast.heads import asked_in_groups

    num_query_heads, asking, _ = queries.shape
    num_kv_heads, length, _ = keys.shape
    group = num_query_heads // num_kv_heads
    before = length - asking
    # To base 2, which a factor on the queries costs nothing.
    asked, sizes = asked_in_groups(queries, scaling / math.log(2), group)
    asked, sizes = asked.flatten(1, 2), sizes.flatten(1, 2)
    # No product is greater than that of both lengths.
    bounds = sizes * keys.float().norm(dim=-1).amax(dim=1, keepdim=True)
    spoiled = None if bool(bounds.isfinite().all()) else _spoiled(queries, keys)
    held = Held(keys, values)
    if not mass:
        context, _ = attend(asked, held, bounds, group, before)
    else:
        context = asked.new_empty(asking, num_query_heads, keys.shape[2])
        received = torch.zeros(num_kv_heads, group, length)
        block = min(max(ELEMENTS // (num_query_heads * length), ROWS[0]), ROWS[1])
        room = asked.new_empty(num_query_heads * min(block, asking) * held.room)
        members = torch.eye(group).repeat(1, block)
        for first in range(0, asking, block):
            last = min(first + block, asking)
            rows = slice(first * group, last * group)
            count = rows.stop - rows.start
            seen = -(-(before + last) // MULTIPLE) * MULTIPLE
            weights = room[: num_kv_heads * count * seen].view(num_kv_heads, count, seen)
            weights[:, :, before + first :] = 0
            part = asked[:, rows].contiguous(), held, bounds[:, rows].contiguous()
            context[first:last], totals = attend(*part, group, before + first, weights)
            if spoiled is not None:
                totals.masked_fill_(spoiled[:, rows], torch.nan)
            # As a product: many times faster than a sum over rows, and summed in float32.
            counted = (members[:, :count] / totals[:, None]).to(torch.bfloat16)
            received[:, :, : before + last] += torch.bmm(counted, weights)[..., : before + last]
    if spoiled is not None:
        wrong = spoiled.view(num_kv_heads, asking, group).transpose(0, 1).flatten(1)
        context.masked_fill_(wrong[..., None], torch.nan)
    return context, received.view(num_query_heads, length) if mass else None


def _spoiled(queries: Tensor, keys: Tensor) -> Tensor:
    """Which queries are no numbers or see keys that are none, (num_kv_heads, m * group): what is
    compiled would not say so."""
    heads, asking = len(keys), queries.shape[1]
    own = ~queries.isfinite().all(dim=-1)
    seen = (~keys.isfinite().all(dim=-1)).cumsum(dim=1)[:, -asking:] > 0
    return (own.view(heads, -1, asking) | seen[:, None]).transpose(1, 2).flatten(1)
