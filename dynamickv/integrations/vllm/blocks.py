"""Budgets in whole blocks: which prompt positions a layer's blocks hold.

vLLM's unit of memory is the block of `block_size` tokens. The block in which the observation window
begins, and those after it, stay where they are: the *tail*. Of the prompt before the tail as many
blocks are kept as the budget needs, and they are filled to the last slot. Knows positions only, no
vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamickv.methods.base import CompressionMethod, EvictingMethod, ScoredMethod
from dynamickv.methods.selection import RankedSelection, ScoredSelection, Selection
from dynamickv.scoring import top_positions


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Where a prompt's kept tokens lie, block by block."""

    prompt_length: int
    tail_block: int
    """Block in which the observation window begins."""
    block_size: int

    @classmethod
    def of(cls, method: CompressionMethod, prompt_length: int, block_size: int) -> BlockPlan:
        """The plan for a prompt; methods without an observation window keep the last token's
        block."""
        window = getattr(method, "window_size", 1)
        return cls(prompt_length, max(prompt_length - window, 0) // block_size, block_size)

    @property
    def tail_start(self) -> int:
        """First position of the tail."""
        return self.tail_block * self.block_size

    def blocks_for(self, held: int) -> int:
        """Blocks before the tail for a layer that is to hold `held` prompt tokens, at least one: it
        names the request."""
        before_tail = held - (self.prompt_length - self.tail_start)
        return min(max(-(-before_tail // self.block_size), 1), self.tail_block)


def room_for(method: CompressionMethod, plan: BlockPlan, num_layers: int) -> int:
    """Blocks before the tail that all layers together may come to hold, at most: as many are set
    aside before the prompt's last part is read, for the compressed copy."""
    if isinstance(method, ScoredMethod):
        layers = range(num_layers)
        if any(method.updates_after(layer, num_layers) for layer in layers):
            tokens = method.mean_budget * num_layers
        else:
            prefix = plan.prompt_length - method.window_size
            tokens = sum(method.first_budget(layer, num_layers, prefix) for layer in layers)
    elif isinstance(method, EvictingMethod):
        tokens = method.capacity * num_layers
    else:
        tokens = plan.prompt_length * num_layers
    return min(tokens // plan.block_size + num_layers, plan.tail_block * num_layers)


def dealt(room: Sequence[Any], kept: Sequence[int], tail_block: int) -> list[list[Any]]:
    """The blocks of the compressed copy, layer after layer; none for a layer that keeps all it
    has, which stays where it is."""
    shares, start = [], 0
    for count in kept:
        count = count if count < tail_block else 0
        shares.append(list(room[start : start + count]))
        start += count
    return shares


def kept_before_tail(selection: Selection, layer: int, plan: BlockPlan) -> Tensor:
    """Positions that a layer keeps before the tail, its budget rounded up to whole blocks.

    Returns:
        LongTensor (heads, blocks x block_size), ascending. The best-scored ones; for a method that
        does not score, what it keeps and then the latest others.
    """
    if isinstance(selection, ScoredSelection):
        held = selection.held[layer] + selection.method.window_size
        scores = selection.scores[layer][:, : plan.tail_start]
    elif isinstance(selection, RankedSelection):
        held, scores = selection.count, selection.scores[layer][:, : plan.tail_start]
    else:
        positions = selection.positions(layer)
        assert isinstance(positions, Tensor)
        heads, held = positions.shape
        scores = torch.arange(plan.prompt_length, device=positions.device).expand(heads, -1)
        scores = scores.scatter_add(
            1, positions, torch.full_like(positions, plan.prompt_length)
        ).float()[:, : plan.tail_start]
    return top_positions(scores, plan.blocks_for(held) * plan.block_size)
