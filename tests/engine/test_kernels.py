"""What is compiled computes what torch does, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.fast.decoder import _rotate

kernels = pytest.importorskip("dynamickv.fast.kernels", reason="needs numba")
bits = kernels.bits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_norm_is_rms_norm() -> None:
    x, weight = random(3, 96) * 4, random(96, seed=1)
    out = torch.empty(3, 96, dtype=torch.bfloat16)
    kernels.norm(x.numpy(), weight.numpy(), 1e-5, bits(out))
    expected = F.rms_norm(x, (96,), weight, 1e-5)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_adds_unrounded(dtype: torch.dtype) -> None:
    x, more = random(2, 64), random(2, 64, seed=1).to(dtype)
    expected = x + more
    kernels.add(x.numpy(), bits(more))
    assert torch.equal(x, expected)


def test_gate_is_silu_times_the_other_half() -> None:
    opened = (random(2, 128) * 30).bfloat16()
    opened[0, :2] = torch.tensor([300.0, -300.0])
    out = torch.empty(2, 64, dtype=torch.bfloat16)
    kernels.gate(bits(opened), bits(out))
    x, factor = opened.float().chunk(2, dim=-1)
    torch.testing.assert_close(out.float(), F.silu(x) * factor, rtol=2**-8, atol=1e-30)


def test_rounding_is_to_the_nearest_and_of_two_to_the_even_one() -> None:
    x = torch.tensor([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.3, 1e-30, 0.0, 7e30]])
    ones = torch.ones(1, 16, dtype=torch.bfloat16)
    opened = torch.cat([ones[:, :8] * 200, x.bfloat16()], dim=1)
    out = torch.empty(1, 8, dtype=torch.bfloat16)
    kernels.gate(bits(opened), bits(out))
    assert torch.equal(out, (x.bfloat16().float() * 200).bfloat16())
    weight = torch.ones(8)
    normal = torch.empty(1, 8, dtype=torch.bfloat16)
    # Rows whose norm is 1, so that weights are what is rounded.
    kernels.norm(torch.ones(1, 8).numpy(), (weight * x[0]).numpy(), 0.0, bits(normal))
    assert torch.equal(normal, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 3])
def test_place_rotates_and_writes_every_copy(copies: int, dtype: torch.dtype) -> None:
    dim, query_heads, kv_heads = 16, 6, 2
    qkv = random((query_heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = random(dim, seed=1), random(dim, seed=2)
    keys, values = torch.zeros(kv_heads * copies, 5, dim), torch.zeros(kv_heads * copies, 5, dim)
    query = torch.empty(query_heads, dim)
    memory = keys[None].numpy(), values[None].numpy()
    kernels.place(bits(qkv), cos.numpy(), sin.numpy(), query.numpy(), *memory, 3)
    heads = qkv.float().view(-1, dim)
    turned = _rotate(heads[:-kv_heads], (cos, sin))
    torch.testing.assert_close(query, turned[:query_heads], rtol=1e-6, atol=1e-6)
    expected = turned[query_heads:].repeat_interleave(copies, dim=0)
    torch.testing.assert_close(keys[:, 3], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(values[:, 3], heads[-kv_heads:].repeat_interleave(copies, dim=0))
    untouched = [0, 1, 2, 4]
    assert not keys[:, untouched].any()
    assert not values[:, untouched].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turn_rotates_all_heads_but_the_last_and_puts_positions_together(
    dtype: torch.dtype,
) -> None:
    qkv, cos, sin = random(5, 7 * 16).to(dtype), random(5, 16, seed=1), random(5, 16, seed=2)
    out = torch.empty(7, 5, 16)
    kernels.turn(bits(qkv), cos.numpy(), sin.numpy(), 6, out.numpy())
    heads = qkv.float().view(5, 7, 16)
    turned = _rotate(heads[:, :6], (cos[:, None], sin[:, None]))
    expected = torch.cat([turned, heads[:, 6:]], dim=1).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 7, 8, 129])
@pytest.mark.parametrize(("heads", "group", "dim"), [(3, 3, 64), (1, 4, 32), (4, 1, 80)])
def test_attend_is_attention_to_what_is_held(length: int, heads: int, group: int, dim: int) -> None:
    query = random(heads * group, dim) * 5
    keys, values = random(heads, 140, dim, seed=1), random(heads, 140, dim, seed=2)
    keys[:, length:] = values[:, length:] = torch.nan
    out = torch.empty(heads * group * dim, dtype=torch.bfloat16)
    room = np.empty((group, length), np.float32)
    memory = keys[None].numpy(), values[None].numpy()
    kernels.attend(query.numpy(), *memory, length, 0.3, room, bits(out))
    grouped = query.view(1, heads, group, dim)
    held = keys[None, :, :length], values[None, :, :length]
    expected = F.scaled_dot_product_attention(grouped, *held, scale=0.3).reshape(-1)
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-5)


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same() -> None:
    made: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", made)
    assert kernels.compiled("int64(int64)")(made["double"])(4) == 8
