"""Products with a matrix, tile by tile, are those of float32 with both factors in bfloat16, of
every shape and by any number of threads; oneDNN's give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.fast.packed import OneDNN, has_fast_products

tiled = pytest.importorskip("dynamickv.fast.tiled", reason="needs numba")

KINDS = [
    pytest.param(tiled.Tiled, id="tiled"),
    pytest.param(
        OneDNN,
        id="onednn",
        marks=pytest.mark.skipif(not has_fast_products(), reason="needs bfloat16 instructions"),
    ),
]
SHAPES = [
    (1, 2, 1),
    (5, 64, 64),
    (6, 64, 65),
    (13, 96, 200),
    (48, 1024, 64),
    (50, 1026, 130),
    (97, 2600, 64),
    (400, 64, 192),
]
"""Rows, inputs, outputs: whole tiles and rests, inputs in one piece and in several."""


def random(*shape: int, size: float = 1) -> Tensor:
    made = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=made) * size).bfloat16()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_products_are_written_added_and_gated(
    rows: int, inputs: int, outputs: int, threads: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is tiled.Tiled:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = random(rows, inputs)
    gate, up = (random(outputs, inputs + own, size=inputs**-0.5)[:, own:] for own in (0, 1))
    first, second = kind(gate.contiguous()), kind(up.contiguous())
    opened, raised = (x.float() @ one.float().t() for one in (gate, up))
    torch.testing.assert_close(first.multiply(x), opened.bfloat16(), rtol=2**-6, atol=1e-4)
    silu = F.silu(opened) * raised
    torch.testing.assert_close(first.gated(x, second).float(), silu, rtol=2**-5, atol=1e-3)
    total = torch.full((rows, outputs), 2.0)
    first.add_product(total, x)
    near = 1e-4 if kind is tiled.Tiled else 2**-7
    torch.testing.assert_close(total, 2 + opened, rtol=near, atol=near)


@pytest.mark.parametrize("stays", [0, 2**40])
def test_a_matrix_that_does_not_stay_in_the_cache_is_multiplied_in_greater_parts(
    stays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "STAYS", stays)
    x, weight = random(200, 64), random(192, 64)
    total = torch.zeros(200, 192)
    tiled.Tiled(weight).add_product(total, x)
    torch.testing.assert_close(total, x.float() @ weight.float().t(), rtol=1e-4, atol=1e-4)


def test_rows_may_lie_apart() -> None:
    x, weight = random(9, 80)[:, 8:72], random(64, 64)
    wanted = (x.float() @ weight.float().t()).bfloat16()
    torch.testing.assert_close(tiled.Tiled(weight).multiply(x), wanted, rtol=2**-6, atol=1e-4)


def test_threads_are_not_let_at_what_does_not_fit() -> None:
    one, other = tiled.Tiled(random(64, 32)), tiled.Tiled(random(128, 32))
    elsewhere = torch.empty(2, 64, device="meta")
    with pytest.raises(TypeError, match="rows must be bfloat16"):
        one.multiply(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="rows of 30 do not fit 32 inputs"):
        one.multiply(random(2, 30))
    for wrong in (other, tiled.Tiled(random(60, 32)), tiled.Tiled(random(64, 30))):
        with pytest.raises(ValueError, match=r"cannot be gated by \(64, 32\)"):
            one.gated(random(2, 32), wrong)
    with pytest.raises(ValueError, match="cannot add 2 rows"):
        one.add_product(torch.zeros(2, 63), random(2, 32))
    with pytest.raises(ValueError, match="cannot add 2 rows"):
        one.add_product(torch.zeros(3, 64), random(2, 32))
    with pytest.raises(TypeError, match="cannot add to"):
        one.add_product(torch.zeros(2, 64).bfloat16(), random(2, 32))
    with pytest.raises(TypeError, match="cannot add to"):
        one.add_product(torch.zeros(64, 2).t(), random(2, 32))
    with pytest.raises(TypeError, match="on the CPU"):
        one.add_product(elsewhere, random(2, 32))
    with pytest.raises(TypeError, match="bfloat16"):
        tiled.Tiled(torch.zeros(64, 32))


def test_no_rows_give_no_products() -> None:
    assert tiled.Tiled(random(64, 32)).multiply(random(0, 32)).shape == (0, 64)


def test_the_last_group_of_panels_may_be_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, weight = random(100, 64), random(448, 64)  # seven panels for five groups of two
    total = torch.zeros(100, 448)
    tiled.Tiled(weight).add_product(total, x)
    torch.testing.assert_close(total, x.float() @ weight.float().t(), rtol=1e-4, atol=1e-4)


def test_what_lies_behind_a_row_is_left_alone() -> None:
    room = torch.full((7 * 65 + 128,), 5.0)
    total, x = room[64:519].view(7, 65), random(7, 64)
    x[::2] = torch.nan
    tiled.Tiled(random(65, 64)).add_product(total, x)
    assert total[1::2].isfinite().all()
    assert (room[:64] == 5).all()
    assert (room[519:] == 5).all()


def test_whole_numbers_stay_whole_over_several_blocks_of_inputs() -> None:
    x = random(13, 1026)
    assert torch.equal(tiled.Tiled(torch.eye(64, 1026).bfloat16()).multiply(x), x[:, :64])
