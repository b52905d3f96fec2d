"""The compiled softmax is softmax over what a query sees, and what it does not see gets nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

softmax = pytest.importorskip("dynamickv.fast.softmax", reason="needs numba")


def logits(rows: int, keys: int, spread: float = 3.0) -> Tensor:
    made = torch.Generator().manual_seed(rows * keys)
    return (torch.randn(rows, keys, generator=made) * spread).bfloat16()


def expected(logits: Tensor, start: int, group: int) -> Tensor:
    rows, keys = logits.shape
    position = start + torch.arange(rows) // group
    hidden = torch.arange(keys) > position[:, None]
    return logits.float().masked_fill(hidden, float("-inf")).softmax(dim=-1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("rows", "keys", "start", "group"),
    [(1, 1, 0, 1), (6, 2, 0, 3), (9, 40, 37, 3), (96, 500, 468, 3), (7, 300, 100, 1)],
)
def test_it_is_softmax_over_what_is_seen(
    rows: int, keys: int, start: int, group: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = logits(rows, keys)
    shares = given.clone()
    softmax.causal_softmax(shares, start, group)
    torch.testing.assert_close(shares.float(), expected(given, start, group), rtol=2**-8, atol=1e-7)


def test_logits_far_apart_leave_all_to_the_greatest() -> None:
    given = torch.tensor(
        [[-3e4, 2e4, -1e30, 1.9e4], [500.0, 500.0, -500.0, -3e38], [-60.0, 60.0, 0.0, 1.0]]
    ).bfloat16()
    wanted = torch.tensor([[0.0, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]])
    shares = given.clone()
    softmax.causal_softmax(shares, 3, 3)
    torch.testing.assert_close(shares.float(), wanted, rtol=0, atol=1e-6)


def test_one_thread_does_the_same_where_torch_has_another_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, alone = logits(48, 200), logits(48, 200)
    softmax.causal_softmax(shared, 184, 3)
    monkeypatch.setattr(softmax, "openmp", lambda: None)
    softmax.causal_softmax(alone, 184, 3)
    assert torch.equal(shared, alone)


def test_several_callers_at_once() -> None:
    def work(number: int) -> None:
        for _ in range(20):
            given = logits(96, 300 + number)
            shares = given.clone()
            softmax.causal_softmax(shares, 268, 3)
            wanted = expected(given, 268, 3)
            torch.testing.assert_close(shares.float(), wanted, rtol=2**-8, atol=1e-7)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("given", [logits(4, 8).float(), logits(8, 4).t()])
def test_what_the_threads_cannot_read_is_refused(given: Tensor) -> None:
    with pytest.raises(TypeError, match="contiguous bfloat16"):
        softmax.causal_softmax(given, 4, 1)


@pytest.mark.parametrize("start", [-1, 5])
def test_rows_that_would_see_more_keys_than_there_are_are_refused(start: int) -> None:
    with pytest.raises(ValueError, match="4 queries from position"):
        softmax.causal_softmax(logits(8, 8), start, 2)
