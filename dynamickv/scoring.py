"""Turn recorded queries and keys into one importance score per head and prompt position.

Pure functions of tensors: no model, no cache, no budget. Higher score = keep. Scores are raw
attention mass in float32, so they may be compared across heads and layers, as DynamicKV does
(arXiv:2412.14838).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.transfer import sent

_BLOCK_ELEMENTS = (2**26, 2**20)
"""Attention weights computed at a time: on accelerators, and on CPUs, where they should stay in
the cache."""
_SAMPLED = 64
"""One value in so many is looked at to guess a threshold."""


def window_shares(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention that each of the last `window` queries pays to each position before them.

    Args:
        queries: (num_query_heads, window, head_dim), the last positions of the prompt.
        keys: (num_kv_heads, prompt_length, head_dim); query head h reads KV head h // group.
        scaling: factor on the query-key products.
        softcap: bound on the logits, softcap * tanh(logits / softcap).
        sinks: (num_query_heads,), learned logits that take their share of every softmax, or one
            per query, (num_query_heads, window, 1).
        bias: added to the logits, (num_query_heads, window, prompt_length).

    Returns:
        (num_query_heads, window, prompt_length - window) float32. The window's own columns take
        their share of the softmax and are then dropped, because the window is always kept.

    Source: SnapKV, arXiv:2404.14469, observation window.
    """
    window, prompt_length = queries.shape[1], keys.shape[1]
    shares = attention_shares(queries, keys, scaling, softcap, sinks, bias)
    return shares[..., : prompt_length - window]


def attention_shares(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """The attention weights of the last `window` queries, (num_query_heads, window, positions),
    float32.

    Args:
        queries, keys, scaling, softcap, sinks, bias: as in `window_shares`.
        visible: which positions each query sees, boolean (window, positions) or
            (num_query_heads, window, positions); by default all up to its own.
    """
    num_query_heads, window, head_dim = queries.shape
    num_kv_heads, positions, _ = keys.shape
    group = num_query_heads // num_kv_heads
    grouped = queries.reshape(num_kv_heads, group * window, head_dim)
    logits = (
        _wide_products(grouped, keys.transpose(1, 2))
        .mul_(scaling)
        .view(num_query_heads, window, positions)
    )
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits += bias
    least = torch.finfo(torch.float32).min
    if visible is None:
        future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu_(1)
        logits[..., positions - window :].masked_fill_(future, least)
    else:
        logits.masked_fill_(~visible, least)
    return softmax_with_sinks(logits, sinks)


def window_attention(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`window_shares` summed over the window's queries, (num_query_heads, prompt_length - window)
    float32."""
    return window_shares(queries, keys, scaling, softcap, sinks, bias).sum(dim=1)


def moments(shares: Tensor) -> Tensor:
    """What CAKE reads of a window's attention.

    Args:
        shares: (num_query_heads, window, n).

    Returns:
        (3, num_query_heads, n): per position the mean over the window's queries, their unbiased
        variance, and the sum of -a ln(a + 1e-10), its part of the attention's dispersion.

    Source: CAKE, arXiv:2503.12491.
    """
    variance, mean = torch.var_mean(shares, dim=1)
    dispersion = (shares + 1e-10).log_().mul_(shares).sum(dim=1).neg_()
    return torch.stack([mean, variance, dispersion])


def unlikeness(keys: Tensor) -> Tensor:
    """How little each key points where the mean of all normalised keys does.

    Args:
        keys: (heads, n, head_dim).

    Returns:
        the negative cosine, (heads, n) float32.

    Source: KeyDiff, arXiv:2504.15364.
    """
    wide = keys.float()
    anchor = F.normalize(wide, dim=-1, eps=1e-12).mean(dim=1, keepdim=True)
    return -F.cosine_similarity(wide, anchor, dim=-1)


def softmax_with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, in place, one more logit per head taking part.

    Args:
        logits: (num_query_heads, queries, positions), float32.
        sinks: (num_query_heads,), or one per query, (num_query_heads, queries, 1), or None.
    """
    if sinks is None:
        # In place: fresh memory costs a CPU as much time as the softmax.
        return torch.softmax(logits, dim=-1, out=logits)
    learned = sinks.float() if sinks.dim() > 1 else sinks.float().view(-1, 1, 1)
    total = torch.logaddexp(logits.logsumexp(dim=-1, keepdim=True), learned)
    return logits.sub_(total).exp_()


def _wide_products(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product in float32 of operands in any number format.

    Products of two half-precision numbers are exact in float32, so CUDA need not widen them first.
    """
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention that every position receives from all queries, exactly.

    Works in blocks of queries: memory is O(block x n) per KV head, never n x n.

    Args:
        queries: (num_query_heads, last positions, head_dim); for the whole prompt's mass, all.
        keys: (num_kv_heads, prompt_length, head_dim).
        softcap, sinks: as in `window_shares`.
        bias: added to the logits, (num_query_heads, last positions, prompt_length).

    Returns:
        (num_query_heads, prompt_length) float32, summed over queries, not normalised.

    Source: H2O, arXiv:2306.14048, accumulated attention.
    """
    num_query_heads, asked, head_dim = queries.shape
    num_kv_heads, length, _ = keys.shape
    group = num_query_heads // num_kv_heads
    grouped = queries.reshape(num_kv_heads, group, asked, head_dim)
    mass = torch.zeros(num_kv_heads, group, length, dtype=torch.float32, device=keys.device)
    block = max(16, _BLOCK_ELEMENTS[keys.device.type == "cpu"] // (group * length))
    # Written over for every block: fresh memory costs a CPU as much time as the softmax.
    room = torch.empty(group * min(block, asked) * length, device=keys.device)
    for head in range(num_kv_heads):
        columns = keys[head].float().mul(scaling).t().contiguous()
        for start in range(0, asked, block):
            rows = min(block, asked - start)
            end = length - asked + start + rows
            queried = grouped[head, :, start : start + rows].float().reshape(group * rows, head_dim)
            shares = room[: group * rows * end].view(group * rows, end)
            torch.mm(queried, columns[:, :end], out=shares)
            if softcap is not None:
                shares.div_(softcap).tanh_().mul_(softcap)
            by_query = shares.view(group, rows, end)
            if bias is not None:
                heads = slice(head * group, (head + 1) * group)
                by_query += bias[heads, start : start + rows, :end]
            future = torch.ones(rows, rows, dtype=torch.bool, device=keys.device)
            by_query[..., end - rows :].masked_fill_(future.triu_(1), float("-inf"))
            softmax_with_sinks(by_query, _sinks_of(sinks, head * group, group, start, rows))
            mass[head, :, :end] += by_query.sum(dim=1)
    return mass.view(num_query_heads, length)


def _sinks_of(sinks: Tensor | None, head: int, group: int, query: int, count: int) -> Tensor | None:
    """Those of `group` heads and, where each query has its own, of `count` queries."""
    if sinks is None:
        return None
    own = sinks[head : head + group]
    return own if own.dim() == 1 else own[:, query : query + count]


def reduce_group(scores: Tensor, num_kv_heads: int, reduction: str) -> Tensor:
    """Join the query heads that share a KV head by "mean", "max" or "sum".

    Args:
        scores: (num_query_heads, n).

    Returns:
        (num_kv_heads, n).
    """
    grouped = scores.view(num_kv_heads, -1, scores.shape[-1])
    return grouped.amax(dim=1) if reduction == "max" else getattr(grouped, reduction)(dim=1)


def pool(scores: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Smooth scores along the positions so that phrases survive whole; shape (heads, n) is kept.

    "max" ignores what lies beyond the ends; "avg" counts it as zero, as the references do.

    Source: SnapKV, arXiv:2404.14469, clustering via pooling.
    """
    apply = F.max_pool1d if pooling == "max" else F.avg_pool1d
    # A wider one reaches beyond both ends from everywhere, and takes torch time and memory.
    width = min(kernel_size, 2 * scores.shape[-1] + 1)
    pooled = apply(scores.unsqueeze(0), width, stride=1, padding=width // 2).squeeze(0)
    return pooled if pooling == "max" or width == kernel_size else pooled * (width / kernel_size)


def top_positions(scores: Tensor, count: int) -> Tensor:
    """The `count` best positions of every head, (heads, count) ascending; ties go to the earlier
    position.

    The order (score, then position) is total, so the best k are always among the best k + 1:
    budgets can shrink step by step and give the same set as one cut.
    """
    heads, length = scores.shape
    if count >= length:
        return torch.arange(length, device=scores.device).expand(heads, length)
    if count <= 0:
        return torch.empty(heads, 0, dtype=torch.long, device=scores.device)
    threshold = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return _places(_best(scores, threshold, count), heads * count).view(heads, count)


def _best(scores: Tensor, threshold: Tensor, count: Tensor | int) -> Tensor:
    """Mask of each row's `count` best scores; those equal to the least of them, `threshold`, fill
    up from the row's start."""
    above, tied = scores > threshold, scores == threshold
    room = count - above.sum(dim=-1, keepdim=True)
    # Counted through all rows at once, which accelerators do many times faster than row by row.
    ties = tied.flatten().cumsum(0, dtype=torch.int32).view_as(tied)
    before = ties[..., :1] - tied[..., :1].int()
    return above | (tied & (ties - before <= room))


def _places(kept: Tensor, total: int) -> Tensor:
    """Last coordinates of a mask's `total` true places, in order.

    CUDA is told their number: asking for it would make the host wait for all the device's work.
    """
    found = kept.nonzero_static(size=total, fill_value=0) if kept.is_cuda else kept.nonzero()
    return found[:, -1]


def top_positions_of_layers(
    scores: Sequence[Tensor], counts: Sequence[int], behind: int = 0
) -> list[Tensor]:
    """`top_positions` of several layers, all of one shape, with a count for each, and as many
    positions more that lie behind those that are scored.

    On one accelerator in one pass: launching a layer's small operations takes longer than they do.
    """
    devices = {layer.device for layer in scores}
    if len(scores) > 1 and len(devices) == 1 and scores[0].device.type != "cpu":
        return top_positions_at_once(scores, counts, behind)
    best = [top_positions(layer, count) for layer, count in zip(scores, counts, strict=True)]
    if behind == 0:
        return best
    heads, length = scores[0].shape
    last = torch.arange(length, length + behind, device=scores[0].device).expand(heads, -1)
    return [torch.cat([kept, last.to(kept.device)], dim=1) for kept in best]


def top_positions_at_once(
    scores: Sequence[Tensor], counts: Sequence[int], behind: int = 0
) -> list[Tensor]:
    """`top_positions_of_layers` without a loop over the layers."""
    heads, length = scores[0].shape
    wanted = [min(max(count, 0), length) for count in counts]
    table = torch.stack(list(scores))
    count = torch.tensor(wanted).to(table.device, non_blocking=True)[:, None, None]
    best = table.topk(max(max(wanted), 1), dim=-1).values
    threshold = best.gather(-1, (count - 1).clamp_min(0).expand(-1, heads, 1))
    kept = F.pad(_best(table, threshold, count) & (count > 0), (0, behind), value=True)
    numbers = [number + behind for number in wanted]
    places = _places(kept, heads * sum(numbers))
    positions = torch.split(places, [heads * number for number in numbers])
    return [layer.view(heads, number) for layer, number in zip(positions, numbers, strict=True)]


def share_among_heads(scores: Tensor, budget: int, floor: float) -> list[int]:
    """How many positions each head keeps when a layer's heads compete for `budget` x heads.

    Every head first gets its int(floor * budget) best; the best of what remains, over all heads,
    fill the rest. Ada-KV mixes the two shares instead; filling in this order spends the budget
    exactly, and a smaller budget keeps a subset of what a larger one keeps.

    Args:
        scores: (heads, n).
        budget: mean positions per head.
        floor: share of the budget that every head keeps, 0 to 1.

    Returns:
        One number per head; they sum to min(budget, n) x heads.

    Source: Ada-KV, arXiv:2407.11550.
    """
    heads, length = scores.shape
    budget = min(budget, length)
    least = int(floor * budget)
    if budget == length:
        return [budget] * heads
    # More than these no head can get.
    most = min(least + (budget - least) * heads, length)
    ranked = scores.topk(most, dim=-1).values[:, least:]
    if ranked.shape[1] == 0 or budget == least:
        return [budget] * heads
    return [least + count for count in count_global_top(list(ranked), (budget - least) * heads)]


def _least_of_best(values: Tensor, count: int) -> Tensor:
    """The least of the `count` best of (n,) values."""
    if values.device.type != "cpu":
        return values.topk(count, sorted=False).values.min()
    # A sample says about where the place lies, so that little more than the best is searched.
    sample = values[::_SAMPLED]
    rank = min(2 * count // _SAMPLED + 8, sample.shape[0])
    best = values[values >= sample.kthvalue(sample.shape[0] - rank + 1).values]
    if best.shape[0] < count:
        best = values
    return best.kthvalue(best.shape[0] - count + 1).values


def count_global_top(scores: Sequence[Tensor], count: int) -> list[int]:
    """How many of the `count` best scores over all layers together lie in each layer.

    Args:
        scores: per layer, (heads, n); n may differ, where `count` is not more than all of them.

    Returns:
        One number per layer; they sum to min(count, all scores). Scores equal at the cut go to the
        earlier layer.
    """
    return counting_global_top(scores, count)()


def counting_global_top(scores: Sequence[Tensor], count: int) -> Callable[[], list[int]]:
    """`count_global_top`, begun: what is given waits for the device to have counted, and for none
    of the work that it was given since."""
    device = scores[0].device
    longest = max(layer.shape[-1] for layer in scores)
    padded = [
        layer
        if (short := longest - layer.shape[-1]) == 0
        else F.pad(layer, (0, short), value=-math.inf)
        for layer in scores
    ]
    table = torch.stack([layer.to(device).reshape(-1) for layer in padded])
    layers, each = table.shape
    if count >= table.numel():
        return lambda: [each] * layers
    threshold = _least_of_best(table.reshape(-1), count)
    above, equal = (table > threshold).sum(dim=1), (table == threshold).sum(dim=1)
    arriving = sent(torch.stack([above, equal]))

    def counted() -> list[int]:
        counts: list[int]
        ties: list[int]
        counts, ties = arriving()
        room = count - sum(counts)
        for layer, tied in enumerate(ties):
            taken = min(tied, room)
            counts[layer] += taken
            room -= taken
        return counts

    return counted
