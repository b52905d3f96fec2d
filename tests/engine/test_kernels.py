"""What is compiled computes what torch does, rounded once."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.fast.decoder import _rotate
from dynamickv.neighbours import openmp

kernels = pytest.importorskip("dynamickv.fast.kernels", reason="needs numba")
bits = kernels.bits
attention = pytest.importorskip("dynamickv.fast.attention", reason="needs numba")


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


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 3])
def test_place_rotates_and_writes_every_copy(
    copies: int, dtype: torch.dtype, held: torch.dtype
) -> None:
    dim, query_heads, kv_heads = 16, 6, 2
    qkv = random((query_heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = random(dim, seed=1), random(dim, seed=2)
    keys, values = torch.zeros(2, kv_heads * copies, 5, dim, dtype=held)
    query = torch.empty(query_heads, dim)
    memory = bits(keys[None]), bits(values[None])
    kernels.place(bits(qkv), cos.numpy(), sin.numpy(), query.numpy(), *memory, 3)
    heads = qkv.float().view(-1, dim)
    turned = _rotate(heads[:-kv_heads], (cos, sin))
    torch.testing.assert_close(query, turned[:query_heads], rtol=1e-6, atol=1e-6)
    expected = turned[query_heads:].repeat_interleave(copies, dim=0)
    rounding = 2**-8 if held == torch.bfloat16 else 1e-6
    torch.testing.assert_close(keys[:, 3].float(), expected, rtol=rounding, atol=1e-6)
    assert torch.equal(values[:, 3], heads[-kv_heads:].repeat_interleave(copies, dim=0).to(held))
    untouched = [0, 1, 2, 4]
    assert not keys[:, untouched].any()
    assert not values[:, untouched].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turn_rotates_queries_and_keys_and_puts_positions_together(dtype: torch.dtype) -> None:
    qkv, cos, sin = random(5, 8 * 16).to(dtype), random(5, 16, seed=1), random(5, 16, seed=2)
    query = torch.empty(4, 5, 16)
    keys, values = torch.empty(2, 2, 5, 16, dtype=torch.bfloat16)
    kernels.turn(bits(qkv), cos.numpy(), sin.numpy(), query.numpy(), bits(keys), bits(values))
    heads = qkv.float().view(5, 8, 16)
    turned = _rotate(heads[:, :6], (cos[:, None], sin[:, None])).transpose(0, 1)
    torch.testing.assert_close(query, turned[:4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(keys.float(), turned[4:], rtol=2**-8, atol=1e-6)
    assert torch.equal(values, heads[:, 6:].transpose(0, 1).bfloat16())


HEADS = [(3, 3, 64), (1, 4, 32), (4, 1, 80)]


def held_of(length: int, heads: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """A token's queries, and keys and values in buffers with room behind `length`."""
    query = random(heads * group, dim) * 5
    keys, values = random(2, 1, heads, length + 11, dim, seed=length)
    keys[:, :, length:] = values[:, :, length:] = torch.nan
    return query, keys, values


def attended_by_us(query: Tensor, *told: Any) -> Tensor:
    out = torch.empty(query.numel(), dtype=torch.bfloat16)
    attention.attend(query, *told, out)
    return out


def attention_of(query: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    grouped = query.view(1, keys.shape[1], -1, keys.shape[3])
    held = keys[:, :, :length], values[:, :, :length]
    return F.scaled_dot_product_attention(grouped, *held, scale=0.3).reshape(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 7, 8, 129, 511, 512, 1501])
@pytest.mark.parametrize(("heads", "group", "dim"), HEADS)
def test_attend_is_attention_to_what_is_held(
    length: int,
    heads: int,
    group: int,
    dim: int,
    threads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, keys, values = held_of(length, heads, group, dim)
    keys, values = keys.to(dtype), values.to(dtype)
    out = attended_by_us(query, keys, values, length, 0.3)
    expected = attention_of(query, keys.float(), values.float(), length)
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-5)


def test_attend_takes_one_thread_where_torch_has_another_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, keys, values = held_of(1501, *HEADS[0])
    several = attended_by_us(query, keys, values, 1501, 0.3)
    monkeypatch.setattr(attention, "openmp", lambda: None)
    alone = attended_by_us(query, keys, values, 1501, 0.3)
    torch.testing.assert_close(alone.float(), several.float(), rtol=2**-7, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another runtime there")
def test_the_threads_are_those_of_torch() -> None:
    assert openmp() is not None


@pytest.mark.parametrize("spoil", [Tensor.bfloat16, Tensor.half, lambda keys: keys.transpose(2, 3)])
def test_threads_are_not_let_at_keys_that_they_cannot_read(spoil: Any) -> None:
    query, keys, values = held_of(1500, 3, 3, 1511)
    with pytest.raises(TypeError, match="argument"):
        attended_by_us(query, spoil(keys), values, 1500, 0.3)


def test_several_callers_attend_at_once() -> None:
    asked = [held_of(1000 + number, *HEADS[0]) for number in range(4)]

    def attended(number: int) -> None:
        length = 1000 + number
        expected = attention_of(*asked[number], length)
        for _ in range(20):
            out = attended_by_us(*asked[number], length, 0.3)
            torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attended, range(4)))


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same() -> None:
    made: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", made)
    assert kernels.compiled("int64(int64)")(made["double"])(4) == 8
