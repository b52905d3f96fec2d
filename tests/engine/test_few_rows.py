"""Products of a few rows with codes are those with the weights that the codes stand for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Format
from torch import Tensor

from dynamickv.fast import codes
from dynamickv.fast.codes import coded
from tests.engine.test_codes import of_six_bits, quantized, rebuilt, weights

few_rows = pytest.importorskip("dynamickv.fast.few_rows", reason="needs numba")
microkernel = pytest.importorskip("dynamickv.fast.microkernel", reason="needs numba")

ROWS = range(1, 9)
KINDS = Format.Q4_0, Format.Q4_1, Format.Q5_1, Format.Q8_0


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(out: Tensor, expected: Tensor) -> bool:
    """Whether nothing was rounded but in float32."""
    return bool((out - expected).norm() < 2e-6 * expected.norm())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_with_the_file_s_weights(
    kind: Format, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # More blocks than a thread takes at a time, and not a multiple.
    weight = quantized(kind, weights(16 * 11, 96))
    found = coded(weight)
    assert found is not None
    x, bias = random(rows, 96), random(16 * 11, seed=4)
    expected = x.double() @ weight.double().T
    assert close(few_rows.multiply(x, found), expected)
    assert close(few_rows.multiply(x, found, bias), expected + bias)
    apart = torch.stack([bias, -bias], dim=-1)[:, 0]
    assert close(few_rows.multiply(x, found, apart), expected + bias)


@pytest.mark.parametrize("rows", ROWS)
def test_halves_of_a_group_have_scales_of_their_own(rows: int) -> None:
    weight = of_six_bits(32, 256)
    found = coded(weight)
    assert found is not None
    x = random(rows, 256)
    assert close(few_rows.multiply(x, found), x.double() @ rebuilt(found).double().T)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_half_gates_the_second(kind: Format, rows: int) -> None:
    weight = quantized(kind, weights(16 * 18, 64)) * 4
    found = coded(weight)
    assert found is not None
    x = random(rows, 64)
    x[0] *= 30  # silu far below and above 0
    opened, raised = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert close(few_rows.gated(x, found), F.silu(opened) * raised)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("instruction", [False, True])
def test_cpus_without_the_instruction_compute_the_same(
    instruction: bool, kind: Format, rows: int
) -> None:
    if instruction and not few_rows.rounds_by_instruction():
        pytest.skip("the CPU has no instruction for it")
    numba = pytest.importorskip("numba")
    multiply = few_rows.block_products(rows, instruction)

    @numba.njit("void(int64, int64, int64, int64, int64, int64)")
    def block(x: Any, sums: Any, data: Any, bits: Any, groups: Any, out: Any) -> None:
        multiply(x, 128 * groups, sums, 4 * groups, data, bits, groups, out, 64)

    found = coded(quantized(kind, weights(16, 64)))
    assert found is not None
    # Numbers of every size that float16 has, its least ones among them, and of both signs.
    sizes = torch.tensor([(-1) ** i * 1.37 * 2.0 ** (15 - 2.6 * i) for i in range(16)])
    for place in range(2 if found.bits == 4 else 3):
        first = found.data.shape[2] - 32 * (place + 1)
        found.data[0, 0, first : first + 32] = sizes.roll(5 * place).half().view(torch.uint8)
    weight = rebuilt(found)
    assert weight.isfinite().all()
    x, out = random(rows, 64), torch.empty(rows, 16)
    sums = x.view(rows, 2, 32).sum(-1)
    places = x.data_ptr(), sums.data_ptr(), found.data.data_ptr()
    block(*places, found.bits, 2, out.data_ptr())
    for own, expected in zip(out.T, weight.double() @ x.double().T, strict=True):
        assert close(own, expected)


def test_rows_that_lie_apart_are_read_as_they_are() -> None:
    weight = quantized(Format.Q4_1, weights(32, 64))
    found = coded(weight)
    assert found is not None
    x = random(64, 3).t()
    assert close(few_rows.multiply(x, found), x.double() @ weight.double().T)


def test_threads_are_not_let_at_what_does_not_fit() -> None:
    found = coded(quantized(Format.Q4_1, weights(48, 64)))
    with pytest.raises(TypeError, match="must be float32"):
        few_rows.multiply(random(1, 64).bfloat16(), found)
    with pytest.raises(TypeError, match="must be float32"):
        few_rows.multiply(random(1, 64), found, random(48).double())
    with pytest.raises(ValueError, match=r"\(1, 32\) does not fit \(48, 64\)"):
        few_rows.multiply(random(1, 32), found)
    with pytest.raises(ValueError, match=r"bias \(32,\)"):
        few_rows.multiply(random(1, 64), found, random(32))
    with pytest.raises(ValueError, match="or its halves"):
        few_rows.gated(random(1, 64), found)


def test_several_callers_multiply_at_once() -> None:
    weight = quantized(Format.Q8_0, weights(16 * 40, 128))
    found = coded(weight)
    x = random(4, 128)
    expected = x.double() @ weight.double().T

    def multiplied(number: int) -> None:
        for _ in range(50):
            own = x[number : number + 1]
            assert close(few_rows.multiply(own, found), expected[number : number + 1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(multiplied, range(4)))


def test_a_block_is_as_wide_as_a_register() -> None:
    assert codes.LANES == microkernel.LANES
    assert np.dtype(np.float32).itemsize * codes.LANES == 64
