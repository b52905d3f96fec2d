"""Attention in bfloat16 blocks is attention; what it adds up on the way is what H2O asks for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynamickv.fast import blockwise
from dynamickv.fast.blockwise import causal_attention
from dynamickv.scoring import attention_mass

pytest.importorskip("numba", reason="the softmax is compiled")


def states(
    length: int, head_dim: int = 16, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of six heads, keys and values of two; all keys moved by one long vector."""
    made = torch.Generator().manual_seed(length)
    queries = torch.randn(6, length, head_dim, generator=made)
    keys = torch.randn(2, length, head_dim, generator=made)
    values = torch.randn(2, length, head_dim, generator=made)
    return queries, keys + offset * torch.randn(head_dim, generator=made), values


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("length", [2, 31, 32, 33, 300])
def test_it_is_causal_attention(length: int, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "has_tiles", lambda: tiles)
    queries, keys, values = states(length)
    context, received = causal_attention(queries, keys, values, 0.25)
    expected = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], is_causal=True, scale=0.25, enable_gqa=True
    )[0]
    assert received is None
    torch.testing.assert_close(context.float().transpose(0, 1), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("asking", [1, 5, 33, 300])
def test_the_last_positions_alone_get_what_they_get_among_all(
    asking: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "has_tiles", lambda: tiles)
    queries, keys, values = states(300)
    whole, _ = causal_attention(queries, keys, values, 0.25)
    last, _ = causal_attention(queries[:, -asking:], keys, values, 0.25)
    torch.testing.assert_close(last.float(), whole[-asking:].float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("length", [2, 40, 300])
def test_its_blocks_add_up_to_the_attention_received(
    length: int, together: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "has_tiles", lambda: tiles)
    monkeypatch.setattr(blockwise, "ELEMENTS", 3 * 70 * length)
    monkeypatch.setattr(blockwise, "TOGETHER", together * 3 * 70 * length)
    queries, keys, values = states(length)
    _, received = causal_attention(queries, keys, values, 0.25, mass=True)
    assert received is not None
    expected = attention_mass(queries, keys, 0.25)
    torch.testing.assert_close(received, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("tiles", [False, True])
def test_what_all_keys_share_costs_no_precision(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "has_tiles", lambda: tiles)
    queries, keys, values = states(200, offset=100.0)
    context, _ = causal_attention(queries, keys, values, 0.25)
    expected = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], is_causal=True, scale=0.25, enable_gqa=True
    )[0]
    torch.testing.assert_close(context.float().transpose(0, 1), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 60.0])
def test_logits_of_any_size_are_attended_by(
    scale: float, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "has_tiles", lambda: tiles)
    queries, keys, values = states(300)
    context, received = causal_attention(queries * scale, keys, values, 0.25, mass=True)
    expected = F.scaled_dot_product_attention(
        queries[None] * scale, keys[None], values[None], is_causal=True, scale=0.25, enable_gqa=True
    )[0]
    assert received is not None
    torch.testing.assert_close(received.sum(dim=1), torch.full((6,), 300.0), rtol=0.01, atol=0)
    # bfloat16 logits of a hundred are half a unit apart: most are the same all the same.
    off = (context.float().transpose(0, 1) - expected).abs().amax(dim=-1)
    assert (off > 0.06).float().mean() < (0.15 if scale > 1 else 0.001)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(
    value: float, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "has_tiles", lambda: tiles)
    queries, keys, values = states(100)
    queries[1, 40, 3] = value
    context, received = causal_attention(queries, keys, values, 0.25, mass=True)
    wrong = context.isnan().any(dim=-1).nonzero().tolist()
    assert wrong == [[40, 1]]
    assert received is not None
    assert received[1].isnan().any()
    assert received[3:].isfinite().all()
    queries, keys, values = states(100)
    keys[1, 60, 3] = value
    context, _ = causal_attention(queries, keys, values, 0.25)
    assert context[60:, 3:].isnan().all()
    assert not context[:, :3].isnan().any()
