"""Runs decoded in one pass say what each says alone."""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dynamickv as dkv
from benchmarks.coverage.check import letters
from benchmarks.coverage.tiny import tiny_model
from dynamickv.cache import BatchedCache, KVCache, prune, rows_bytes
from dynamickv.decoding.cpu_ops import ColumnOps, CpuOps, PackedOps, is_intel
from dynamickv.decoding.decode import extend, feeder
from dynamickv.decoding.decode_step import RowSteps
from dynamickv.layers.kv import KVLayer
from dynamickv.layers.parts import BatchedLayer
from dynamickv.layers.rows import RowsLayer
from dynamickv.reading.observe import _of_parts
from tests.engine.models.test_coverage import known
from tests.engine.test_generate_families import IN_ROWS
from tests.engine.tiny import COMPRESSING, DOCUMENT, FAMILIES, QUESTION, tiny_llm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_runs_decoded_together_say_what_each_says_alone(family: str, attention: str) -> None:
    llm = tiny_llm(family, attention=attention)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    methods = [dkv.FullKV(), *COMPRESSING, dkv.SnapKV(capacity=24, granularity="query_head")]
    together = dkv.compare(llm, prefill=prefill, methods=methods, max_new_tokens=8)
    for method, run in zip(methods, together.runs, strict=True):
        alone = dkv.compare(llm, prefill=prefill, methods=[method], max_new_tokens=8).runs[0]
        assert run.token_ids == alone.token_ids, method
        assert run.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", IN_ROWS)
def test_layers_of_every_kind_are_decoded_together(name: str) -> None:
    """Rows of like and of unlike length, and heads of unlike length where the model has them."""
    llm = dkv.LoadedModel.wrap(tiny_model(known(name)), letters(), name, "tiny")
    # The question is fed to each cache by itself, so that their windows and states differ too.
    prefill = dkv.prefill(llm, DOCUMENT[:90], QUESTION, question_aware=False)
    small: dict[str, Any] = {"window_size": 4, "kernel_size": 5}
    methods: list[dkv.CompressionMethod] = [
        dkv.FullKV(),
        dkv.SnapKV(capacity=8, **small),
        dkv.DynamicKV(capacity=24, **small),
        dkv.PyramidKV(capacity=40, **small),
    ]
    # A state beside the whole prompt would have to be in two places.
    alone = "hybrid" in llm.geometry.kinds
    if not llm.geometry.joint:
        methods += [
            dkv.SnapKV(capacity=size, granularity="query_head", **small) for size in (9, 24)
        ]
    if not (alone or takes_the_step(llm)):
        methods += [dkv.LAVa(capacity=24, **small)]
    together = compared(llm, prefill, *methods)
    assert {run.decoded_together for run in together} == {1 if alone else len(methods)}
    for method, run in zip(methods, together, strict=True):
        (own,) = compared(llm, prefill, method)
        assert run.token_ids == own.token_ids, method
        assert run.logprobs == pytest.approx(own.logprobs, abs=1e-4), method


@pytest.mark.parametrize("free", [0, 10**9])
def test_caches_are_copied_into_rows_only_where_memory_has_room(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []

    class Copied(RowsLayer):
        @classmethod
        def of(cls, layers: Any) -> RowsLayer:
            copied.append(len(layers))
            return RowsLayer.of(layers)

    monkeypatch.setattr("dynamickv.cache.RowsLayer", Copied)
    monkeypatch.setattr("dynamickv.decoding.together.free_on", lambda device: free)
    llm = tiny_llm(attention="eager")
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    methods = [dkv.SnapKV(capacity=size) for size in (24, 28, 32, 36)]
    together = compared(llm, prefill, *methods)
    assert bool(copied) == bool(free)
    assert {run.decoded_together for run in together} == {len(methods)}
    for method, run in zip(methods, together, strict=True):
        (own,) = compared(llm, prefill, method)
        assert run.token_ids == own.token_ids, method


def test_a_copy_in_rows_takes_no_more_than_was_counted() -> None:
    """Caches whose long layers are others: each layer is as long as its longest."""
    prefill = dkv.prefill(tiny_llm(), DOCUMENT, QUESTION)
    caches = caches_of(prefill, [dkv.SnapKV(capacity=30), dkv.PyramidKV(capacity=30)])
    rows = BatchedCache(caches, 8)
    taken = sum(layer.reserved_bytes for layer in rows.layers)
    assert sum(cache.nbytes for cache in caches) < taken <= rows_bytes(caches)


def test_what_is_learned_of_every_query_goes_with_its_row() -> None:
    """Such as a bias by distance, which every row makes from its own query."""
    parts = [KVLayer(0) for _ in range(2)]
    for part in parts:
        part.hold(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), seen=3)

    def told(*_: Any, position_bias: torch.Tensor, **__: Any) -> tuple[torch.Tensor, None]:
        return position_bias, None

    bias = torch.randn(2, 2, 1, 3)
    given: Any = (object(), {"position_bias": bias})
    query = torch.zeros(2, 2, 1, 4)
    assert torch.equal(_of_parts("eager", told, BatchedLayer(parts, [1, 1]), given, query), bias)


def compared(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, *methods: dkv.CompressionMethod
) -> list[dkv.Run]:
    """Every method's run; FullKV shares the pass of the others."""
    events = dkv.compare_stream(
        llm, prefill=prefill, methods=methods, max_new_tokens=6, full_apart=False
    )
    return [event.record for event in events if isinstance(event, dkv.RunFinished)]


def test_a_run_that_keeps_everything_is_decoded_alone(llm: dkv.LoadedModel) -> None:
    methods = [
        dkv.FullKV(),
        dkv.SnapKV(capacity=5000),
        dkv.SnapKV(capacity=24),
        dkv.DynamicKV(capacity=24),
    ]
    runs = dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=4).runs
    assert [run.decoded_together for run in runs] == [1, 1, 2, 2]
    assert runs[1].logprobs == runs[0].logprobs


def test_full_kv_shares_the_pass_when_asked_and_nothing_else_keeps_everything(
    llm: dkv.LoadedModel,
) -> None:
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    small = [dkv.SnapKV(capacity=24), dkv.DynamicKV(capacity=24)]

    shared = compared(llm, prefill, dkv.FullKV(), dkv.StreamingLLM(capacity=24), *small)
    assert [run.decoded_together for run in shared] == [4, 4, 4, 4]
    alone = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=6).runs[0]
    assert shared[0].token_ids == alone.token_ids
    assert shared[0].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    fits = compared(llm, prefill, dkv.FullKV(), dkv.SnapKV(capacity=5000), *small)
    assert [run.decoded_together for run in fits] == [1, 1, 2, 2]
    assert fits[1].logprobs == fits[0].logprobs


def test_answers_that_end_early_leave_the_others_running(llm: dkv.LoadedModel) -> None:
    methods = [
        dkv.FullKV(),
        dkv.StreamingLLM(capacity=24),
        dkv.SnapKV(capacity=24),
        dkv.DynamicKV(capacity=24),
    ]
    before = dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=6)
    early = before.run("SnapKV").token_ids[1]
    stopping = dkv.LoadedModel(
        name=llm.name,
        revision=llm.revision,
        model=llm.model,
        tokenizer=llm.tokenizer,
        geometry=llm.geometry,
        stop_ids=frozenset([early]),
    )
    after = dkv.compare(stopping, DOCUMENT, QUESTION, methods=methods, max_new_tokens=6)
    for run, whole in zip(after.runs, before.runs, strict=True):
        assert run.token_ids == whole.token_ids[: len(run.token_ids)]
        assert run.finish_reason == ("stop" if early in whole.token_ids else "length")


# The step for several caches on the CPU against the model's own forward pass.

STEPPED = [name for name in FAMILIES if name != "gemma3"]
ROWS: list[dkv.CompressionMethod] = [
    dkv.DynamicKV(capacity=24),
    dkv.FullKV(),
    dkv.SnapKV(capacity=40, granularity="query_head"),
]


def takes_the_step(llm: dkv.LoadedModel, plain: bool = True) -> bool:
    return isinstance(feeder(llm, plain), RowSteps)


def caches_of(prefill: dkv.Prefill, methods: list[dkv.CompressionMethod]) -> list[KVCache]:
    return [prune(prefill, method.select(prefill.layers), room=2) for method in methods]


@pytest.mark.parametrize("family", STEPPED)
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("ops", [CpuOps, ColumnOps])
def test_a_step_for_several_caches_computes_what_the_model_does(
    family: str, rows: int, ops: type[CpuOps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the room that was reserved, at positions of their own, while one leaves midway; the
    model's own pass then continues from what the steps left."""
    monkeypatch.setattr("dynamickv.decoding.cpu_ops.is_intel", lambda: ops is CpuOps)
    assert type(CpuOps.fastest()) is ops
    llm = tiny_llm(family)
    assert takes_the_step(llm)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    stepped, expected = (caches_of(prefill, ROWS[:rows]) for _ in range(2))
    tokens = [40, 301, 7]
    positions = [prefill.length, prefill.length + 5, prefill.length + 9]
    feed = RowSteps(llm)
    for step in range(4):
        active = rows if step < 3 else max(1, rows - 1)
        now = [position + step for position in positions[:active]]
        logits = feed(stepped[:active], tokens[:active], now)
        for row, cache in enumerate(expected[:active]):
            own = extend(llm, cache, [tokens[row]], now[row])
            torch.testing.assert_close(logits[row], own, rtol=0, atol=1e-4)
        tokens = [int(row.argmax()) for row in logits] + tokens[active:]
        assert [cache.nbytes for cache in stepped] == [cache.nbytes for cache in expected]
    for one, other in zip(stepped, expected, strict=True):
        for mine, own in zip(one.whole_layers(), other.whole_layers(), strict=True):
            assert (mine.length, mine.seen) == (own.length, own.seen)
            for held, same in zip(mine.held(), own.held(), strict=True):
                torch.testing.assert_close(held, same, rtol=0, atol=1e-4)
        after = [extend(llm, cache, [11, 12], prefill.length + 20) for cache in (one, other)]
        torch.testing.assert_close(*after, rtol=0, atol=1e-4)


def test_whose_cpu_it_is_is_read_where_the_system_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6 Model 207, GenuineIntel")
    told = tmp_path / "cpuinfo"
    assert is_intel(told)
    told.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "utf-8")
    assert not is_intel(told)
    told.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n", "utf-8")
    assert is_intel(told)


@pytest.mark.parametrize("family", STEPPED)
def test_packed_weights_compute_what_the_model_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed once enough rows were fed, used for as long as enough are left."""
    packed: list[int] = []

    class Watched(PackedOps):
        def _product(self, x: torch.Tensor, *linears: torch.nn.Linear) -> torch.Tensor:
            packed.append(len(x))
            return super()._product(x, *linears)

    monkeypatch.setattr("dynamickv.decoding.decode_step.PackedOps", Watched)
    monkeypatch.setattr(RowSteps, "PAYS", 4)
    llm = tiny_llm(family)
    methods = [*ROWS, dkv.H2O(capacity=24), dkv.PyramidKV(capacity=24)]
    feed, tokens = RowSteps(llm), [40, 301, 7, 9, 12]
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    stepped, expected = (caches_of(prefill, methods) for _ in range(2))
    for step, rows in enumerate((5, 5, 4, 3, 2)):
        before = len(packed)
        now = [prefill.length + step] * rows
        logits = feed(stepped[:rows], tokens[:rows], now)
        assert set(packed[before:]) == ({rows} if step in (1, 2, 3) else set())
        for row, cache in enumerate(expected[:rows]):
            own = extend(llm, cache, [tokens[row]], now[row])
            torch.testing.assert_close(logits[row], own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lacks", ["memory", "oneDNN"])
def test_weights_are_not_packed_without(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowSteps, "PAYS", 1)
    if lacks == "memory":
        monkeypatch.setattr("dynamickv.decoding.decode_step.free_host_memory", lambda: 1000)
    else:
        monkeypatch.setattr(PackedOps, "available", lambda: False)
    monkeypatch.setattr(PackedOps, "__init__", None)
    llm = tiny_llm()
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    caches = caches_of(prefill, [*ROWS, dkv.SnapKV(capacity=24)])
    feed = RowSteps(llm)
    for step in range(2):
        assert feed(caches, [1, 2, 3, 4], [prefill.length + step] * 4).isfinite().all()


def half() -> dkv.LoadedModel:
    llm = tiny_llm()
    llm.model.to(torch.bfloat16)
    return llm


def offloaded() -> dkv.LoadedModel:
    llm = tiny_llm()
    model: Any = llm.model
    model.model.layers[3].mlp.down_proj.to("meta")
    return llm


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (partial(tiny_llm, "gemma3"), True),
        (partial(tiny_llm, "llama", "eager"), True),
        (partial(tiny_llm, hidden_act="gelu"), True),
        (offloaded, True),
        (half, True),
        (tiny_llm, False),
    ],
    ids=[
        "sliding layers",
        "eager attention",
        "gelu",
        "offloaded",
        "half precision",
        "heads of unequal length",
    ],
)
def test_what_the_step_does_not_compute_is_left_to_the_model(make: Any, plain: bool) -> None:
    assert not takes_the_step(make(), plain)
