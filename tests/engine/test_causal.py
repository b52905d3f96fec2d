"""Compiled attention is softmax over what a query sees; what it does not see gets nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

causal = pytest.importorskip("dynamickv.fast.causal", reason="needs numba")
heads = pytest.importorskip("dynamickv.fast.heads")
team = pytest.importorskip("dynamickv.fast.team")

FEW, MANY = 1.0, 1e9
"""Bounds within and beyond what is summed as it is."""


class Case:
    """Queries, keys and values of some geometry, and what attention makes of them in float64."""

    def __init__(
        self, queries: int, keys: int, group: int = 3, dim: int = 16, size: float = 1
    ) -> None:
        made = torch.Generator().manual_seed(queries * keys + dim)
        heads = 2
        self.group, self.before = group, keys - queries
        asked = torch.randn(heads, queries * group, dim, generator=made) * size
        self.asked = asked.bfloat16()
        self.keys = torch.randn(heads, keys, dim, generator=made).bfloat16()
        self.values = torch.randn(heads, keys, dim, generator=made).bfloat16()
        self.bounds = torch.full(asked.shape[:2], FEW)
        logits = self.asked.double() @ self.keys.double().transpose(1, 2)
        position = self.before + torch.arange(queries * group) // group
        logits.masked_fill_(torch.arange(keys) > position[:, None], float("-inf"))
        self.weights = torch.exp2(logits - logits.amax(dim=-1, keepdim=True))
        self.weights /= self.weights.sum(dim=-1, keepdim=True)
        context = (self.weights @ self.values.double()).view(heads, queries, group, dim)
        self.context = context.transpose(0, 1).flatten(1, 2).float()

    def attend(self, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        laid = heads.laid_out(
            self.keys, self.values, torch.zeros(len(self.keys), self.keys.shape[2])
        )
        given = self.asked, laid, self.bounds, self.group, self.before
        context, totals = causal.attend(*given, kept)
        return context, totals

    def check(self) -> None:
        context, _ = self.attend()
        torch.testing.assert_close(context.float(), self.context, rtol=2**-6, atol=4e-3)


SHAPES = [(1, 1), (2, 2), (1, 700), (3, 40), (33, 96), (100, 100), (97, 700), (200, 129)]


@pytest.mark.parametrize("bound", [FEW, MANY])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("queries", "keys"), [(min(shape), max(shape)) for shape in SHAPES])
def test_it_is_attention_to_what_is_seen(
    queries: int, keys: int, threads: int, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = Case(queries, keys)
    case.bounds.fill_(bound)
    case.check()


@pytest.mark.parametrize("dim", [2, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_heads_of_every_size_and_group(dim: int, group: int) -> None:
    Case(40, 130, group=group, dim=dim, size=dim**-0.5).check()


@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_as_great_as_their_bound_may_be_are_summed_as_they_are(sign: int) -> None:
    case = Case(4, 5000, group=1)
    case.asked.fill_(sign * 2.5)
    case.keys.fill_(2.5)  # products of 100
    case.bounds.fill_(causal.REACH)
    context, totals = case.attend()
    assert totals.isfinite().all()
    wanted = case.values.float().cumsum(dim=1) / torch.arange(1, 5001)[:, None]
    wanted = wanted[:, -4:].transpose(0, 1)
    torch.testing.assert_close(context.float(), wanted, rtol=2**-6, atol=2e-3)


def test_logits_far_apart_leave_all_to_the_greatest() -> None:
    case = Case(12, 300, size=200)
    case.bounds.fill_(MANY)
    case.check()
    assert case.weights.amax(dim=-1).mean() > 0.95


def test_rows_are_bounded_one_by_one() -> None:
    case = Case(10, 200)
    case.asked[:, 3::4] *= 300
    case.bounds[:, 3::4] = MANY
    other = Case(10, 200)
    context, totals = case.attend()
    untouched = [row for row in range(30) if row % 4 != 3]
    # What such a row's neighbours get does not depend on it, though they have a pass more.
    torch.testing.assert_close(
        context.view(10, 2, 3, 16).transpose(0, 1).reshape(2, 30, 16)[:, untouched].float(),
        other.context.view(10, 2, 3, 16).transpose(0, 1).reshape(2, 30, 16)[:, untouched],
        rtol=2**-6, atol=4e-3,
    )  # fmt: skip
    assert totals.isfinite().all()


@pytest.mark.parametrize("bound", [FEW, MANY])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 96), (100, 700)])
def test_weights_are_kept_where_there_is_room(queries: int, keys: int, bound: float) -> None:
    case = Case(queries, keys)
    case.bounds.fill_(bound)
    room = -(-keys // 64) * 64 + 64
    kept = torch.zeros(2, 3 * queries, room, dtype=torch.bfloat16)
    context, totals = case.attend(kept)
    assert torch.equal(context, case.attend()[0])
    shares = kept.float() / totals[:, :, None]
    torch.testing.assert_close(shares[:, :, :keys], case.weights.float(), rtol=2**-6, atol=1e-6)
    assert not kept[:, :, keys:].any()


def test_one_thread_does_the_same_where_torch_has_another_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(97, 400)
    shared = case.attend()[0]
    monkeypatch.setattr(team, "openmp", lambda: None)
    assert torch.equal(shared, case.attend()[0])


def test_there_is_room_for_every_thread_that_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once for laying out and once for attending: who asked again might be told of more.
    threads = iter([2, 2])
    monkeypatch.setattr(torch, "get_num_threads", lambda: next(threads))
    case = Case(97, 400)
    case.attend()


def test_great_logits_of_what_is_not_seen_take_nothing_off() -> None:
    case = Case(70, 70, size=0.1)
    case.bounds.fill_(MANY)
    case.keys[:, 50] *= 3000
    earlier = case.context[:50]
    torch.testing.assert_close(case.attend()[0][:50].float(), earlier, rtol=2**-6, atol=4e-3)


def test_several_callers_at_once() -> None:
    def work(number: int) -> None:
        for _ in range(20):
            Case(96, 300 + number).check()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_what_the_threads_cannot_read_is_refused() -> None:
    for name, wrong in (
        ("asked", Case(4, 8).asked.float()),
        ("asked", Case(4, 8).asked.transpose(1, 2)),
        ("bounds", torch.zeros(2, 12).double()),
        ("bounds", torch.zeros(2, 24)[:, ::2]),
    ):
        case = Case(4, 8)
        setattr(case, name, wrong)
        with pytest.raises(TypeError, match="must be contiguous"):
            case.attend()
    with pytest.raises(TypeError, match="must be contiguous"):
        Case(4, 8).attend(torch.zeros(2, 12, 64))


@pytest.mark.parametrize("before", [-1, 5])
def test_queries_that_would_see_more_keys_than_there_are_are_refused(before: int) -> None:
    case = Case(4, 8)
    case.before = before
    with pytest.raises(ValueError, match="cannot attend to 2 heads of 8 positions"):
        case.attend()


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case(4, 8)
    case.bounds = case.bounds[:, :3].contiguous()
    with pytest.raises(ValueError, match="with bounds"):
        case.attend()
    for room in ((2, 12, 40), (2, 11, 64), (1, 12, 64)):
        with pytest.raises(ValueError, match="have no room for 8 keys"):
            Case(4, 8).attend(torch.zeros(room).bfloat16())


def test_rows_that_see_whole_blocks_follow_rows_that_do_not() -> None:
    Case(60, 540, group=1).check()  # some begin before a block of 512 keys and end in it


def test_a_greatest_logit_of_nothing_is_one_all_the_same() -> None:
    case = Case(8, 256, group=1)
    case.asked.fill_(1)
    case.keys.fill_(-9)  # logits of -144, beyond what a look-up takes
    case.keys[:, 0] = 0
    case.bounds.fill_(MANY)
    context, _ = case.attend()
    wanted = case.values[:, :1].transpose(0, 1).expand(8, -1, -1).float()
    torch.testing.assert_close(context.float(), wanted, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("own", range(4))
def test_one_row_of_great_logits_makes_its_neighbours_no_worse(own: int) -> None:
    case = Case(12, 200, group=1, size=200)
    rest = [row for row in range(12) if row % 4 != own]
    case.asked[:, rest] = 0
    case.bounds[:, own::4] = MANY
    context, _ = case.attend()
    torch.testing.assert_close(context[own::4].float(), case.context[own::4], rtol=2**-6, atol=4e-3)
    means = torch.stack([case.values[:, : 189 + row].float().mean(dim=1) for row in rest])
    torch.testing.assert_close(context[rest].float(), means, rtol=2**-6, atol=4e-3)


def test_the_greatest_logit_may_be_the_last_keys() -> None:
    case = Case(4, 66, group=1)
    case.keys[:, 64:] = (case.asked[:, 2:] * 100).bfloat16()
    case.bounds.fill_(MANY)
    context, _ = case.attend()
    wanted = case.values[:, 64:].transpose(0, 1).float()
    torch.testing.assert_close(context[2:].float(), wanted, rtol=2**-7, atol=1e-6)


def test_logits_beyond_what_is_summed_as_it_is_have_their_greatest_taken_off() -> None:
    case = Case(4, 5000, group=1)
    case.asked.fill_(3)
    case.keys.fill_(2.46875)  # products of 118.5
    case.bounds.fill_(118.5)
    context, totals = case.attend()
    assert totals.isfinite().all()
    assert context.isfinite().all()
