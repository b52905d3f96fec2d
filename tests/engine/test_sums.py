"""What threads add to the sum through the layers, and how they normalise it, is what torch does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sums = pytest.importorskip("dynamickv.fast.sums", reason="needs numba")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 127, 128, 500])
def test_rows_are_added_unrounded(rows: int) -> None:
    x, more = random(rows, 96), random(rows, 96, seed=1).bfloat16()
    expected = x + more
    sums.add_rows(x, more)
    assert torch.equal(x, expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 127, 128, 500])
def test_rows_are_normalised_by_rms(rows: int) -> None:
    x, weight = random(rows, 96) * 4, random(96, seed=1)
    found = sums.normed_rows(x, weight, 0.5)
    torch.testing.assert_close(found.float(), F.rms_norm(x, (96,), weight, 0.5), rtol=2**-8, atol=0)


def test_a_part_of_the_rows_is_added_to_in_its_place() -> None:
    x = random(10, 32)
    before = x.clone()
    sums.add_rows(x[-4:], torch.ones(4, 32, dtype=torch.bfloat16))
    assert torch.equal(x[:6], before[:6])
    assert torch.equal(x[6:], before[6:] + 1)


def test_what_the_threads_cannot_read_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot add"):
        sums.add_rows(random(2, 8), random(2, 8))
    with pytest.raises(TypeError, match="must be contiguous"):
        sums.add_rows(random(8, 2).t(), random(2, 8).bfloat16())
    with pytest.raises(ValueError, match=r"cannot add \(3, 8\) to \(2, 8\)"):
        sums.add_rows(random(2, 8), random(3, 8).bfloat16())
    with pytest.raises(TypeError, match="cannot normalise"):
        sums.normed_rows(random(2, 8).bfloat16(), random(8), 1e-5)
    with pytest.raises(ValueError, match="rows of 8 have 4 weights"):
        sums.normed_rows(random(2, 8), random(4), 1e-5)
