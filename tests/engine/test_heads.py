"""What is compiled for a prompt's heads rotates, scales and lays out as torch does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamickv.fast.decoder import _rotate

heads = pytest.importorskip("dynamickv.fast.heads", reason="needs numba")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [1, 5, 256, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turn_rotates_queries_and_keys_and_puts_positions_together(
    dtype: torch.dtype, length: int
) -> None:
    qkv = random(length, 8 * 16).to(dtype)
    cos, sin = random(length, 16, seed=1), random(length, 16, seed=2)
    query, keys, values = heads.turn(qkv, cos, sin, 4)
    own = qkv.float().view(length, 8, 16)
    turned = _rotate(own[:, :6], (cos[:, None], sin[:, None])).transpose(0, 1)
    torch.testing.assert_close(query, turned[:4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(keys.float(), turned[4:], rtol=2**-8, atol=1e-6)
    assert torch.equal(values, own[:, 6:].transpose(0, 1).bfloat16())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("laid_out", ["apart", "together", "last"])
def test_queries_of_a_group_stand_together_scaled(laid_out: str) -> None:
    queries = random(6, 300, 16)
    if laid_out == "together":
        queries = random(300, 6, 16).transpose(0, 1)
    if laid_out == "last":
        queries = random(6, 500, 16)[:, -300:]
    asked, sizes = heads.asked_in_groups(queries, 0.3, 3)
    wanted = (queries * 0.3).view(2, 3, 300, 16).transpose(1, 2)
    assert asked.shape == (2, 300, 3, 16)
    torch.testing.assert_close(asked.float(), wanted, rtol=2**-8, atol=1e-7)
    torch.testing.assert_close(sizes, wanted.norm(dim=-1))


def test_queries_whose_numbers_lie_apart_are_read_right() -> None:
    queries = random(2, 16, 9).transpose(1, 2)
    asked, _ = heads.asked_in_groups(queries, 1.0, 1)
    torch.testing.assert_close(asked[:, :, 0].float(), queries, rtol=2**-8, atol=1e-7)


def test_what_the_threads_cannot_read_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot rotate"):
        heads.turn(random(3, 64).double(), random(3, 16), random(3, 16), 2)
    with pytest.raises(ValueError, match="not 2 query heads of 4 rows"):
        heads.turn(random(3, 64), random(4, 16), random(4, 16), 2)
    with pytest.raises(TypeError, match="queries must be float32"):
        heads.asked_in_groups(random(2, 3, 16).bfloat16(), 1.0, 1)
    with pytest.raises(ValueError, match="3 query heads do not fall"):
        heads.asked_in_groups(random(3, 3, 16), 1.0, 2)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "dim"), [(1, 2), (63, 16), (64, 64), (700, 80), (129, 128)])
def test_keys_are_laid_out_as_columns_and_values_in_pairs(
    length: int, dim: int, dtype: torch.dtype
) -> None:
    keys, values = random(3, length, dim).to(dtype), random(3, length, dim, seed=1).to(dtype)
    middle = random(3, dim, seed=2)
    laid = heads.laid_out(keys, values, middle)
    less = (keys.float() - middle[:, None]).bfloat16()
    torch.testing.assert_close(laid.sizes, less.float().norm(dim=-1), rtol=1e-3, atol=1e-3)
    tiles, across = -(-length // 64), -(-dim // 64) * 64
    columns = torch.zeros(3, tiles * 64, dim, dtype=torch.bfloat16)
    columns[:, :length] = less
    wanted = columns.view(3, tiles, 64, dim // 2, 2).transpose(2, 3)
    torch.testing.assert_close(laid.columns, wanted, rtol=2**-8, atol=1e-6)
    rows = torch.zeros(3, tiles * 64, across, dtype=torch.bfloat16)
    rows[:, :length, :dim] = values.bfloat16()
    assert torch.equal(laid.pairs, rows.view(3, tiles * 32, 2, across).transpose(2, 3))
    part = laid.of_heads(slice(1, 2))
    assert torch.equal(part.pairs, laid.pairs[1:2])
    assert torch.equal(part.sizes, laid.sizes[1:2])


def test_keys_and_values_that_do_not_fit_are_not_laid_out() -> None:
    with pytest.raises(TypeError, match="float64"):
        heads.laid_out(random(2, 8, 16).double(), random(2, 8, 16), random(2, 16))
    with pytest.raises(TypeError, match="bfloat16 and"):
        heads.laid_out(random(2, 8, 16).bfloat16(), random(2, 8, 16), random(2, 16))
    with pytest.raises(ValueError, match="cannot attend to"):
        heads.laid_out(random(2, 8, 16), random(2, 7, 16), random(2, 16))
    with pytest.raises(ValueError, match="cannot attend to"):
        heads.laid_out(random(2, 8, 15), random(2, 8, 15), random(2, 15))
    with pytest.raises(ValueError, match="cannot attend to"):
        heads.laid_out(random(2, 8, 16), random(2, 8, 16), random(1, 16))
