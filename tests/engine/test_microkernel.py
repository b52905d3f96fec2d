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
    wanted = a[:, :size].float() @ b.float().t()
    wide = torch.full((rows, 80), 3.0)
    told = a.data_ptr(), (size + 6) * 2, columns.data_ptr(), 256, size // 2, wide.data_ptr(), 320
    caller(microkernel.products(rows, True, instruction), 7)(*told)
    torch.testing.assert_close(wide[:, :64], wanted, rtol=1e-5, atol=1e-5)
    caller(microkernel.products(rows, False, instruction), 7)(*told)
    torch.testing.assert_close(wide[:, :64], 2 * wanted, rtol=1e-5, atol=1e-5)
    assert (wide[:, 64:] == 3).all()
    out = torch.full((rows, 80), 3.0).bfloat16()
    told = *told[:5], out.data_ptr(), 160
    caller(microkernel.products(rows, True, instruction, narrow=True), 7)(*told)
    torch.testing.assert_close(out[:, :64], wanted.bfloat16(), rtol=2**-7, atol=1e-5)
    assert (out[:, 64:] == 3).all()


@pytest.mark.parametrize("instruction", HOW)
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_weights_are_powers_of_what_counts(rows: int, instruction: bool) -> None:
    a, b = random(rows, 16) * 3, random(64, 16)
    logits = a.float() @ b.float().t()
    columns = microkernel.in_columns(b)
    counts = torch.tensor([64.0, 1, 0, 17, -3, 900])[:rows]
    most = logits.amax(dim=1)
    limits = torch.stack([counts, most], dim=1).contiguous()
    weights, totals = torch.ones(rows, 96, dtype=torch.bfloat16), torch.ones(rows, 16)
    places = weights.data_ptr(), 192, totals.data_ptr(), limits.data_ptr()
    code = microkernel.weighed(rows, instruction)
    caller(code, 9)(a.data_ptr(), 32, columns.data_ptr(), 256, 8, *places)
    wanted = torch.exp2(logits - most[:, None])
    wanted[torch.arange(64) >= counts[:, None]] = 0
    check_weights(weights, totals, wanted)


LOOKED_UP = pytest.param(
    True,
    True,
    id="looked up",
    marks=pytest.mark.skipif(not microkernel.looks_up_bytes(), reason="the CPU has no look-up"),
)
WAYS = [pytest.param(*how.values, False, id=how.id, marks=how.marks) for how in HOW]


@pytest.mark.parametrize(("instruction", "by_look_up"), [*WAYS, LOOKED_UP])
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (4, 2), (4, 16), (4, 64), (6, 96)])
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_weights_of_several_tiles_are_powers(
    rows: int, size: int, tiles: int, instruction: bool, by_look_up: bool
) -> None:
    a, b = random(rows, size) * 3, random(64 * tiles, size)
    a[0] = 1.0 / size  # a row of small logits, of which none is whole
    # and one that reaches both ends
    a[-1, 0], a[-1, 1:], b[:4, 0] = 1, 0, torch.tensor([100, -100, 0, 1.0]).bfloat16()
    logits = a.float() @ b.float().t()
    columns = microkernel.in_columns(b)
    weights = torch.ones(rows, 64 * tiles + 32, dtype=torch.bfloat16)
    totals = torch.ones(rows, 16)
    places = weights.data_ptr(), 128 * tiles + 64, totals.data_ptr(), tiles, 128 * size
    code = microkernel.weighed_tiles(rows, instruction, by_look_up)
    caller(code, 10)(a.data_ptr(), 2 * size, columns.data_ptr(), 256, size // 2, *places)
    inside = logits.abs().amax(dim=1) <= 100
    assert inside[-1]
    check_weights(weights[inside], totals[inside], torch.exp2(logits[inside]), by_look_up)


def check_weights(
    weights: Tensor, totals: Tensor, wanted: Tensor, by_look_up: bool = False
) -> None:
    columns = wanted.shape[1]
    # Rounding, and the powers' own error, or that of rounded logits.
    near = 2**-8 + (2**-8 if by_look_up else 3e-4)
    torch.testing.assert_close(weights[:, :columns].float(), wanted, rtol=near, atol=1e-30)
    assert (weights[:, columns:] == 1).all()
    own = weights[:, :columns].float() if by_look_up else wanted
    sums = 16 + own.double().sum(dim=1)
    torch.testing.assert_close(totals.double().sum(dim=1), sums, rtol=3e-4, atol=0)


@pytest.mark.parametrize("instruction", HOW)
def test_gated_is_silu_times_the_others_and_sums_are_sums(instruction: bool) -> None:
    opened, raised = random(64, 1)[:, 0].float() * 8, random(1, 64)[0].float()
    extremes = torch.tensor([0.0, -79, 79, -1e30, 200, -100, 1e30, float("nan")])
    opened[:8], raised[:8], raised[5] = extremes, 1.0, 1e30
    wanted = torch.nn.functional.silu(opened.double()) * raised
    caller(microkernel.gating(instruction), 2)(opened.data_ptr(), raised.data_ptr())
    torch.testing.assert_close(opened.double()[8:], wanted[8:], rtol=3e-4, atol=1e-30)
    seen, expected = opened.double()[:8], wanted[:8]
    torch.testing.assert_close(seen[[0, 2, 4, 6, 7]], expected[[0, 2, 4, 6, 7]], equal_nan=True)
    assert seen[[1, 3]].abs().max() < 1e-30
    assert -1e-4 < seen[5] <= 0
    out = torch.empty(80).bfloat16()
    share: dict[str, Any] = {"share": microkernel.shared(instruction)}
    exec("def call(x, factor, out):\n    share(x, factor, out)", share)
    compiled = kernels.compiled("void(int64, float32, int64)")(share["call"])
    numbers = torch.arange(64.0)
    compiled(numbers.data_ptr(), 0.3, out.data_ptr())
    torch.testing.assert_close(out[:64], (numbers * 0.3).bfloat16(), rtol=2**-7, atol=0)
    add: dict[str, Any] = {"add": microkernel.lanes_sum}
    exec("def call(x):\n    return add(x)", add)
    assert kernels.compiled("float32(int64)")(add["call"])(numbers.data_ptr()) == 120


@pytest.mark.parametrize("instruction", HOW)
def test_weights_of_logits_far_below_the_greatest_are_none(instruction: bool) -> None:
    a, b = torch.full((1, 2), 200.0).bfloat16(), torch.zeros(64, 2).bfloat16()
    b[1:] = -3e4
    limits = torch.tensor([[64.0, 0.0]])
    weights, totals = torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(1, 16)
    columns = microkernel.in_columns(b)
    places = weights.data_ptr(), 128, totals.data_ptr(), limits.data_ptr()
    caller(microkernel.weighed(1, instruction), 9)(
        a.data_ptr(), 4, columns.data_ptr(), 256, 1, *places
    )
    assert weights[0, 0] == 1
    assert weights[0, 1:].float().max() < 1e-37
    assert weights.min() >= 0
    assert np.isclose(totals.sum().item(), 1, atol=1e-6)
