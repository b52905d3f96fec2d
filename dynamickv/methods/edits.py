"""What a person wants kept or dropped, whatever a method would choose: spans of prompt positions.

A pinned span takes the places of the worst positions chosen, an evicted one leaves its places to
the next best, so that a layer's number of tokens stays. Only a layer with fewer places than pinned
tokens holds more, and one with too few positions left holds fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamickv.records import Heads
from dynamickv.scoring import top_positions

Spans = Sequence[Sequence[int]]
"""[first, last) pairs of prompt positions."""


def read_spans(name: str, spans: Any) -> tuple[tuple[int, int], ...]:
    """The spans as tuples.

    Raises:
        ValueError: anything but a list of [first, last) pairs of whole numbers.
    """
    if isinstance(spans, str) or not isinstance(spans, Sequence):
        raise ValueError(f"{name} must be a list of [first, last) positions, got {spans!r}")
    for span in spans:
        if (
            isinstance(span, str)
            or not isinstance(span, Sequence)
            or len(span) != 2
            or any(isinstance(place, bool) or not isinstance(place, int) for place in span)
            or not 0 <= span[0] < span[1]
        ):
            raise ValueError(f"{name} must hold [first, last) pairs of positions, got {span!r}")
    return tuple((first, last) for first, last in spans)


def require_apart(pinned: Spans, evicted: Spans) -> None:
    """Raise ValueError where a position is pinned and evicted."""
    for first, last in pinned:
        for start, end in evicted:
            if first < end and start < last:
                raise ValueError(
                    f"pinned [{first}, {last}) and evicted [{start}, {end}) overlap; "
                    "a token is kept or dropped, not both"
                )


def edited_positions(
    scores: Tensor, count: int | Sequence[int], pinned: Spans, evicted: Spans
) -> Heads:
    """The best positions of every head, once a person's spans are obeyed.

    Args:
        scores: (heads, prompt_length) over the whole prompt; inf for what the method itself always
            keeps.
        count: positions per head, for all heads or for each; then heads may differ.

    Returns:
        Ascending positions, (heads, kept), or one (kept,) per head where counts are given for each.

    Raises:
        ValueError: a span beyond the prompt, or nothing left to keep.
    """
    length = scores.shape[1]
    end = max(last for _, last in (*pinned, *evicted))
    if end > length:
        raise ValueError(
            f"a pinned or evicted span ends at position {end} and the part of the prompt that is "
            f"compressed has {length} tokens; mark a passage inside it"
        )
    order = scores.clone()
    for first, last in pinned:
        order[:, first:last] = math.inf
    for first, last in evicted:
        order[:, first:last] = -math.inf
    least, most = int((order[0] == math.inf).sum()), int((order[0] > -math.inf).sum())
    if most == 0:
        raise ValueError(f"evicted spans cover all {length} tokens; leave something to keep")
    if isinstance(count, int):
        return top_positions(order, min(max(count, least), most))
    counts = [min(max(number, least), most) for number in count]
    return tuple(
        top_positions(order[head : head + 1], number)[0] for head, number in enumerate(counts)
    )


def whole_prompt(length: int, heads: int, device: torch.device, evicted: Spans) -> Tensor:
    """All positions but the evicted, (heads, kept): what is held of a prompt that fits."""
    if not evicted:
        return torch.arange(length, device=device).expand(heads, -1)
    zeros = torch.zeros(heads, length, device=device)
    kept = edited_positions(zeros, length, (), evicted)
    assert isinstance(kept, Tensor)  # one count for all heads
    return kept
