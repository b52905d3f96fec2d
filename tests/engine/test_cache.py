"""What a cache takes out of keys and values, in whatever order they lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamickv.cache import gather
from dynamickv.layers.kv import gather_at_once


def in_order(states: Tensor, order: str) -> Tensor:
    """The same (heads, n, head_dim) numbers, laid out otherwise."""
    if order == "positions outermost":
        return states.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "room behind":
        return torch.cat([states, torch.full_like(states, torch.nan)], dim=1)[:, : states.shape[1]]
    if order == "other things between":
        return torch.cat([states, torch.full_like(states, torch.nan)], dim=2)[..., :4]
    return states


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(
    "order",
    ["heads outermost", "positions outermost", "room behind", "other things between"],
)
def test_gathered_rows_are_those_asked_for(order: str, heads: int, room: int) -> None:
    states = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.stack([torch.randperm(9)[:5].sort().values for _ in range(heads)])
    gathered = gather(in_order(states, order), kept, room)
    assert gathered.shape == (1, heads, 5 + room, 4)
    for head, positions in enumerate(kept.tolist()):
        for place, position in enumerate(positions):
            assert torch.equal(gathered[0, head, place], states[head * 2 // heads, position])


def test_rows_that_are_no_multiple_of_a_head_apart_are_gathered_too() -> None:
    states = torch.rand(2, 9, 7)[..., :4]
    kept = torch.tensor([[0, 8], [3, 4]])
    gathered = gather(states, kept, 0)[0]
    assert torch.equal(gathered, torch.stack([states[0, [0, 8]], states[1, [3, 4]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "order",
    ["heads outermost", "positions outermost", "room behind", "other things between"],
)
@pytest.mark.parametrize("dim", [4, 7])
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_gathered_at_once_are_those_asked_for(
    dtype: torch.dtype, order: str, dim: int, offset: int
) -> None:
    states = in_order(torch.randn(2, 9, dim).to(dtype), order)
    if offset:
        # Not where eight bytes begin.
        moved = torch.empty(states.untyped_storage().nbytes() // dtype.itemsize + 1, dtype=dtype)
        states = moved.as_strided(states.shape, states.stride(), 1).copy_(states)
    kept = torch.stack([torch.randperm(9)[:5].sort().values for _ in range(2)])
    room = torch.zeros(2, 8, states.shape[2], dtype=dtype)
    gather_at_once(states, kept, room[:, :5])
    expected = torch.stack([states[head, places] for head, places in enumerate(kept)])
    assert torch.equal(room[:, :5], expected)
    assert not room[:, 5:].any()
