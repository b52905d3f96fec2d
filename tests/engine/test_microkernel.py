"""Products of a tile, and its weights, are those of float32 with both factors in bfloat16; so they
are without the CPU's instruction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

kernels = pytest.importorskip("dynamickv.fast.kernels", reason="needs numba")
microkernel = pytest.importorskip("dynamickv.fast.microkernel")

HOW = [
    pytest.param(False, id="emulated"),
    pytest.param(
        True,
        id="instruction",
        marks=pytest.mark.skipif(
            not kernels.rounds_by_instruction(), reason="the CPU has no such instruction"
        ),
    ),
]


def random(*shape: int) -> Tensor:
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=made).bfloat16()


def caller(code: Any, takes: int) -> Any:
    """A compiled function that does nothing but call it."""
    names = ", ".join(f"a{number}" for number in range(takes))
    made: dict[str, Any] = {"code": code}
    exec(f"def call({names}):\n    code({names})", made)
    return kernels.compiled(f"void({', '.join(['int64'] * takes)})")(made["call"])


@pytest.mark.parametrize("instruction", HOW)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("size", [2, 64, 96])
def test_products_are_products_and_are_added(rows: int, size: int, instruction: bool) -> None:
    a, b = random(rows, size + 6), random(64, size)
    columns = microkernel.in_columns(b)
    assert columns.shape == (1, size // 2, 64, 2)
    out = torch.full((rows, 64), 3.0)
    wanted = a[:, :size].float() @ b.float().t()
    told = a.data_ptr(), (size + 6) * 2, columns.data_ptr(), 256, size // 2, out.data_ptr()
    caller(microkernel.products(rows, True, instruction), 6)(*told)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    caller(microkernel.products(rows, False, instruction), 6)(*told)
    torch.testing.assert_close(out, 2 * wanted, rtol=1e-5, atol=1e-5)


def test_pairs_of_rows_are_summed_by_weights() -> None:
    weights, values = random(6, 40), random(40, 80)
    pairs = microkernel.in_pairs(values, 64)
    assert pairs.shape == (32, 128, 2)
    add = caller(microkernel.products(6, True), 6)
    for column in (0, 64):
        out = torch.empty(6, 64)
        add(weights.data_ptr(), 80, pairs.data_ptr() + column * 4, 512, 20, out.data_ptr())
        wanted = (weights.float() @ values.float())[:, column : column + 64]
        torch.testing.assert_close(out[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-5)
        assert not out[:, wanted.shape[1] :].any()


@pytest.mark.parametrize("instruction", HOW)
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("rows", [1, 6])
def test_weights_are_powers_of_what_counts(rows: int, limited: bool, instruction: bool) -> None:
    a, b = random(rows, 16) * 3, random(64, 16)
    logits = a.float() @ b.float().t()
    columns = microkernel.in_columns(b)
    counts = torch.tensor([64.0, 1, 0, 17, -3, 900])[:rows]
    most = logits.amax(dim=1)
    limits = torch.stack([counts, most], dim=1).contiguous()
    weights, totals = torch.ones(rows, 96, dtype=torch.bfloat16), torch.ones(rows, 16)
    places = weights.data_ptr(), 192, totals.data_ptr(), limits.data_ptr()
    code = microkernel.weighed(rows, limited, instruction)
    caller(code, 9)(a.data_ptr(), 32, columns.data_ptr(), 256, 8, *places)
    wanted = torch.exp2(logits)
    if limited:
        wanted = torch.exp2(logits - most[:, None])
        wanted[torch.arange(64) >= counts[:, None]] = 0
    torch.testing.assert_close(weights[:, :64].float(), wanted, rtol=2**-7, atol=1e-30)
    assert (weights[:, 64:] == 1).all()
    lanes = 1 + wanted.view(rows, 4, 16).sum(dim=1)
    torch.testing.assert_close(totals, lanes, rtol=1e-3, atol=0)


def test_weights_of_logits_far_below_the_greatest_are_none() -> None:
    a, b = torch.full((1, 2), 200.0).bfloat16(), torch.zeros(64, 2).bfloat16()
    b[1:] = -3e4
    limits = torch.tensor([[64.0, 0.0]])
    weights, totals = torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(1, 16)
    columns = microkernel.in_columns(b)
    places = weights.data_ptr(), 128, totals.data_ptr(), limits.data_ptr()
    caller(microkernel.weighed(1, True), 9)(a.data_ptr(), 4, columns.data_ptr(), 256, 1, *places)
    assert weights[0, 0] == 1
    assert weights[0, 1:].float().max() < 1e-37
    assert np.isclose(totals.sum().item(), 1, atol=1e-6)
