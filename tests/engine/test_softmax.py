"""The compiled exponentials are softmax over what a query sees, and what it does not see gets
nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

softmax = pytest.importorskip("dynamickv.fast.softmax", reason="needs numba")
team = pytest.importorskip("dynamickv.fast.team")

FEW, MANY = 1.0, 1e9
"""Bounds within and beyond what is summed as it is."""


def logits(rows: int, keys: int, spread: float = 4.0) -> Tensor:
    made = torch.Generator().manual_seed(rows * keys)
    return (torch.randn(rows, keys, generator=made) * spread).bfloat16()


def shares_of(given: Tensor, start: int, group: int, bound: float) -> Tensor:
    """Attention weights, float32."""
    weights, totals = given.clone(), torch.empty(len(given))
    bounds = torch.full_like(totals, bound)
    softmax.causal_exponentials(weights, bounds, totals, start, group)
    return weights.float() / totals[:, None]


def expected(logits: Tensor, start: int, group: int) -> Tensor:
    rows, keys = logits.shape
    position = start + torch.arange(rows) // group
    hidden = torch.arange(keys) > position[:, None]
    powers = torch.exp2(logits.double() - logits.double().amax()).masked_fill(hidden, 0)
    return (powers / powers.sum(dim=-1, keepdim=True)).float()


@pytest.mark.parametrize("bound", [FEW, MANY])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("rows", "keys", "start", "group"),
    [(1, 1, 0, 1), (6, 2, 0, 3), (9, 40, 37, 3), (96, 500, 468, 3), (7, 300, 100, 1)],
)
def test_they_are_softmax_over_what_is_seen(
    rows: int,
    keys: int,
    start: int,
    group: int,
    threads: int,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = logits(rows, keys)
    shares = shares_of(given, start, group, bound)
    torch.testing.assert_close(shares, expected(given, start, group), rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_logits_as_great_as_their_bound_may_be_are_summed_as_they_are(level: float) -> None:
    given = torch.full((4, 5000), level).bfloat16()
    given[:, 7] = -level
    shares = shares_of(given, 4999, 4, softmax.REACH)
    assert shares.isfinite().all()
    torch.testing.assert_close(shares, expected(given, 4999, 4), rtol=2**-8, atol=1e-7)


def test_logits_far_apart_leave_all_to_the_greatest() -> None:
    given = torch.tensor(
        [[-3e4, 2e4, -1e30, 1.9e4], [500.0, 500.0, -500.0, -3e38], [-60.0, 60.0, 0.0, 1.0]]
    ).bfloat16()
    wanted = torch.tensor([[0.0, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]])
    torch.testing.assert_close(shares_of(given, 3, 3, MANY), wanted, rtol=0, atol=1e-6)


def test_rows_are_bounded_one_by_one() -> None:
    given = torch.stack([torch.full((64,), 3.0), torch.full((64,), 300.0)]).bfloat16()
    weights, totals = given.clone(), torch.empty(2)
    softmax.causal_exponentials(weights, torch.tensor([3.0, 300.0]), totals, 63, 2)
    torch.testing.assert_close(totals, torch.tensor([8.0 * 64, 64.0]), rtol=1e-4, atol=0)


def test_division_puts_heads_and_groups_in_their_place() -> None:
    attended = logits(2 * 10 * 3, 16).view(2, 30, 16)
    totals = torch.rand(2, 30) + 1
    shares = (attended.float() / totals[:, :, None]).view(2, 10, 3, 16)
    wanted = shares.transpose(0, 1).flatten(1, 2)
    found = softmax.divided(attended, totals, 3)
    torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("place", [0, 1])
def test_what_cannot_be_divided_is_refused(place: int) -> None:
    given = [logits(6, 8).view(2, 3, 8), torch.ones(2, 3)]
    given[place] = given[place].double()
    with pytest.raises(TypeError, match="what is divided must be contiguous"):
        softmax.divided(*given, 3)


def test_one_thread_does_the_same_where_torch_has_another_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = shares_of(logits(48, 200), 184, 3, FEW)
    monkeypatch.setattr(team, "openmp", lambda: None)
    assert torch.equal(shared, shares_of(logits(48, 200), 184, 3, FEW))


def test_several_callers_at_once() -> None:
    def work(number: int) -> None:
        for _ in range(20):
            given = logits(96, 300 + number)
            shares = shares_of(given, 268, 3, FEW)
            torch.testing.assert_close(shares, expected(given, 268, 3), rtol=2**-8, atol=1e-7)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("given", [logits(4, 8).float(), logits(8, 4).t()])
def test_logits_that_the_threads_cannot_read_are_refused(given: Tensor) -> None:
    with pytest.raises(TypeError, match="contiguous bfloat16"):
        shares_of(given, 4, 1, FEW)


@pytest.mark.parametrize("wrong", [torch.zeros(4).double(), torch.zeros(8)[::2]])
@pytest.mark.parametrize("place", [0, 1])
def test_bounds_and_totals_that_the_threads_cannot_read_are_refused(
    wrong: Tensor, place: int
) -> None:
    told = [torch.zeros(4), torch.zeros(4)]
    told[place] = wrong
    with pytest.raises(TypeError, match="contiguous float32"):
        softmax.causal_exponentials(logits(4, 8), *told, 4, 1)


@pytest.mark.parametrize("start", [-1, 5])
def test_rows_that_would_see_more_keys_than_there_are_are_refused(start: int) -> None:
    with pytest.raises(ValueError, match="4 queries from position"):
        shares_of(logits(8, 8), start, 2, FEW)


def test_another_number_of_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="4 rows have 3 bounds"):
        softmax.causal_exponentials(logits(4, 8), torch.zeros(3), torch.zeros(4), 4, 1)
