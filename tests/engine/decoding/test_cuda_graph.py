"""The decode step written for capture answers like the model's own forward pass, on any device and
with any operations; the graph itself needs CUDA."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dynamickv as dkv
from benchmarks.gpu.answers import Computed
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.cuda_graph import (
    DecodeGraph,
    ForgettingGraphs,
    fastest_ops,
    graphable,
)
from dynamickv.decoding.decode import choose, decode, extend
from dynamickv.decoding.decode_step import DecodeStep, PlainOps
from dynamickv.decoding.forgetting import forgetting_of
from dynamickv.fast.decoder import Stage, stages, steppable
from tests.engine.tiny import (
    DOCUMENT,
    FAMILIES,
    QUESTION,
    SMALL_INSTANCES,
    small_instances,
    tiny_llm,
)

STEPS = 20
families = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METHODS = [
    *(m for m in SMALL_INSTANCES if m.name != "LAVa"),  # its heads part, which no graph takes
    *(m for m in small_instances(granularity="query_head") if m.name == "SnapKV"),
]


FORGETTING = [
    m for m in METHODS if m.capabilities.decoding and getattr(m, "head_budgets", "") != "adaptive"
]


def pruned(llm: dkv.LoadedModel, method: Any, room: int = 0) -> tuple[KVCache, dkv.Prefill]:
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=method.needs_mass)
    return prune(prefill, method.select(prefill.layers), room), prefill


def plain(llm: dkv.LoadedModel, method: Any) -> list[tuple[int, float]]:
    """Token ids and log-probabilities from the model's own forward pass."""
    cache, prefill = pruned(llm, method)
    answer = [choose(prefill.logits)]
    for position in range(prefill.length, prefill.length + STEPS):
        answer.append(choose(extend(llm, cache, [answer[-1][0]], position)))
    return answer


@torch.inference_mode()
def stepped(
    llm: dkv.LoadedModel, method: Any, ops: PlainOps, tokens: list[int | None] | None = None
) -> list[tuple[int, float]]:
    """The same from `DecodeStep`, run eagerly, fed these tokens; None is the one chosen last."""
    cache, prefill = pruned(llm, method)
    step = DecodeStep(llm, cache, prefill.length, STEPS, ops)
    answer = [choose(prefill.logits)]
    for token in tokens or [None] * STEPS:
        step.token.fill_(answer[-1][0] if token is None else token)
        step()
        token_id, logprob = step.chosen.tolist()
        answer.append((int(token_id), logprob))
    return answer


def assert_same(actual: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [token for token, _ in actual] == [token for token, _ in expected]
    assert len({token for token, _ in actual}) > 3, "one token repeated would prove little"
    assert [value for _, value in actual] == pytest.approx(
        [value for _, value in expected], abs=2e-4
    )


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_step_decodes_every_method_like_the_model(method: Any) -> None:
    llm = tiny_llm()
    assert_same(stepped(llm, method, PlainOps()), plain(llm, method))


@families
def test_step_decodes_every_family_like_the_model(family: str) -> None:
    llm, method = tiny_llm(family), dkv.DynamicKV(capacity=24)
    assert steppable(llm)
    assert_same(stepped(llm, method, PlainOps()), plain(llm, method))


def parted(layers: int) -> list[Stage]:
    """A decoder of that many layers as it would lie on devices that take turns."""
    cpu, half = torch.device("cpu"), layers // 2
    return [
        Stage(cpu, range(0, half), embeds=True, norms=False, speaks=False),
        Stage(cpu, range(half, layers), embeds=False, norms=True, speaks=False),
        Stage(cpu, range(layers, layers), embeds=False, norms=False, speaks=True),
    ]


@families
def test_stages_pass_on_what_one_step_computes(family: str) -> None:
    llm, method = tiny_llm(family), dkv.DynamicKV(capacity=24)
    cache, prefill = pruned(llm, method)
    parts = parted(llm.geometry.num_layers)
    graph = DecodeGraph(
        llm, cache, prefill.length, STEPS, PlainOps(), capture=Computed, parts=parts
    )
    answer = [choose(prefill.logits)]
    for _ in range(STEPS):
        answer.append(graph.advance(answer[-1][0]))
    assert answer == stepped(llm, method, PlainOps())
    assert [layer.seen for layer in cache.layers] == [prefill.length + STEPS] * len(cache.layers)


# Steps that are begun before the token that they feed is read.


class Counted(Computed):
    """A stage that counts how often it was replayed."""

    replayed = 0

    def replay(self) -> None:
        self.replayed += 1
        super().replay()


@torch.inference_mode()
def fed(
    llm: dkv.LoadedModel, method: Any, tokens: list[int | None], ahead: bool, remember: int = 0
) -> tuple[Any, KVCache, dkv.Prefill, DecodeGraph]:
    """What a graph chose after each token, None being what it chose last, and what it left."""
    cache, prefill = pruned(llm, method)
    graph = DecodeGraph(
        llm, cache, prefill.length, STEPS, PlainOps(), remember, capture=Counted, ahead=ahead
    )
    chosen = [choose(prefill.logits)]
    for token in tokens:
        chosen.append(graph.advance(chosen[-1][0] if token is None else token))
    return chosen, cache, prefill, graph


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "tokens",
    [
        [None] * STEPS,
        [None] * 7,
        [5, 6, 7, 8, 9, 5],
        [None, None, 5, None, 7, 7, None, None, None],
        [5] * STEPS,
    ],
    ids=["to the end", "ended early", "forced", "forced now and then", "forced to the end"],
)
def test_steps_begun_ahead_choose_and_leave_the_same(method: Any, tokens: list[int | None]) -> None:
    llm = tiny_llm()
    expected, theirs, prefill, _ = fed(llm, method, tokens, ahead=False)
    chosen, ours, _, _ = fed(llm, method, tokens, ahead=True)
    assert chosen == expected == stepped(llm, method, PlainOps(), tokens)
    for cache in (ours, theirs):
        assert [layer.seen for layer in cache.layers] == [prefill.length + len(tokens)] * len(
            cache.layers
        )
    for one, other in zip(ours.whole_layers(), theirs.whole_layers(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.held(), other.held(), strict=True))
    later = [extend(llm, c, [9, 8], prefill.length + len(tokens)) for c in (ours, theirs)]
    assert torch.equal(*later)


@families
def test_every_family_begins_steps_ahead(family: str) -> None:
    llm, method = tiny_llm(family), dkv.DynamicKV(capacity=24)
    chosen = fed(llm, method, [None] * STEPS, ahead=True)[0]
    assert chosen == stepped(llm, method, PlainOps())


@pytest.mark.parametrize("count", [1, 7, STEPS - 1, STEPS])
def test_one_step_is_begun_ahead_and_none_that_there_is_no_room_for(count: int) -> None:
    llm, method = tiny_llm(), dkv.DynamicKV(capacity=24)
    *_, graph = fed(llm, method, [None] * count, ahead=True)
    assert graph._stages[0].replayed == min(count + 1, STEPS)  # type: ignore[attr-defined]
    *_, graph = fed(llm, method, [None] * count, ahead=False)
    assert graph._stages[0].replayed == count  # type: ignore[attr-defined]


@pytest.mark.parametrize("remember", [1, 4, STEPS])
@pytest.mark.parametrize("tokens", [[None] * 3, [None] * 9, [None, 5] * 4, [None] * STEPS])
def test_queries_of_steps_begun_in_vain_are_not_remembered(
    tokens: list[int | None], remember: int
) -> None:
    llm, method = tiny_llm(), dkv.DynamicKV(capacity=24)
    ours, theirs = (fed(llm, method, tokens, ahead, remember)[3].asked() for ahead in (True, False))
    for layer, queries in theirs.items():
        assert queries.shape[1] == min(remember, len(tokens))
        assert torch.equal(ours[layer], queries)


def test_a_decoder_in_parts_begins_nothing_ahead() -> None:
    llm, method = tiny_llm(), dkv.DynamicKV(capacity=24)
    cache, prefill = pruned(llm, method)
    parts = parted(llm.geometry.num_layers)
    graph = DecodeGraph(
        llm, cache, prefill.length, STEPS, PlainOps(), capture=Counted, parts=parts, ahead=True
    )
    graph.advance(5)
    assert [stage.replayed for stage in graph._stages] == [1, 1, 1]  # type: ignore[attr-defined]


def test_a_model_on_one_device_is_one_stage() -> None:
    llm = tiny_llm()
    layers = range(llm.geometry.num_layers)
    assert stages(llm) == [Stage(torch.device("cpu"), layers, True, True, True)]


def test_weights_that_are_away_while_unused_are_no_stage() -> None:
    llm = tiny_llm()
    model: Any = llm.model
    model.model.layers[1].to("meta")
    assert stages(llm) == []
    assert not graphable(llm)


class Launched(TorchDispatchMode):
    """Counts what is computed, each operation by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_token_launches_as_much_for_a_pruned_cache_as_for_the_full_one() -> None:
    llm = tiny_llm()
    of_pass, of_step = [], []
    for method in (dkv.FullKV(), dkv.DynamicKV(capacity=24)):
        cache, prefill = pruned(llm, method, room=STEPS)
        with Launched() as launched:
            extend(llm, cache, [5], prefill.length)
        of_pass.append(launched.times)
        step = DecodeStep(llm, pruned(llm, method)[0], prefill.length, STEPS, PlainOps())
        with Launched() as launched:
            step()
        of_step.append(launched.times)
    assert of_pass[0] == of_pass[1]
    assert of_step[0] == of_step[1]
    assert sum(of_pass[0].values()) > 40 * llm.geometry.num_layers


def test_rewinding_gives_the_same_tokens_again() -> None:
    llm, method = tiny_llm(), dkv.DynamicKV(capacity=24)
    cache, prefill = pruned(llm, method)
    with torch.inference_mode():
        step = DecodeStep(llm, cache, prefill.length, 4, PlainOps())
        first = [step().clone() for _ in range(4)]
        step.rewind()
        assert step.slots.tolist() == [layer.length for layer in cache.layers]
        again = [step().clone() for _ in range(4)]
    assert torch.equal(torch.stack(first), torch.stack(again))


def test_slots_follow_each_layer_and_positions_the_text() -> None:
    llm = tiny_llm()
    cache, prefill = pruned(llm, dkv.DynamicKV(capacity=24))
    lengths = [layer.length for layer in cache.layers]
    assert len(set(lengths)) > 1
    with torch.inference_mode():
        step = DecodeStep(llm, cache, prefill.length, 3, PlainOps())
        for _ in range(3):
            step()
    assert step.slots.tolist() == [length + 3 for length in lengths]
    assert step.position.item() == prefill.length + 3


def test_reserved_room_is_zero_and_what_is_held_stays() -> None:
    llm = tiny_llm()
    cache, prefill = pruned(llm, dkv.SnapKV(capacity=24))
    layer = cache.layers[0]
    before = [states.clone() for states in layer.held()]
    buffers = layer.reserve(7)
    for buffer, states in zip(buffers, before, strict=True):
        assert buffer.shape[2] == 24 + 7
        assert torch.equal(buffer[:, :, :24], states)
        assert not buffer[:, :, 24:].any()
    assert layer.reserve(7)[0].data_ptr() == buffers[0].data_ptr()
    layer.grow_in_place()
    assert (layer.length, layer.seen) == (25, prefill.length + 1)
    assert layer.held()[0].data_ptr() == buffers[0].data_ptr()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"mlp_bias": True}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        ),
    ],
    ids=["gelu", "mlp bias", "dynamic rope"],
)
def test_models_the_step_does_not_compute_are_left_alone(
    family: str, changes: dict[str, Any]
) -> None:
    assert not steppable(tiny_llm(family, **changes))


def test_graphs_are_for_cuda() -> None:
    assert not graphable(tiny_llm())


# Compression that goes on while answering: graph after graph.

DECODING = dkv.Decoding(budget=32, buffer=8)
LONG = 40


@torch.inference_mode()
def forgetting_answer(
    llm: dkv.LoadedModel,
    method: Any,
    ops: PlainOps | None,
    capture: Any = None,
    ahead: bool = False,
) -> tuple[list[int], list[tuple[int, list[Any]]], list[float]]:
    """Tokens, what every choice left, and the most stored per layer and head: from graphs, or
    without `ops` from the model's own pass."""
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=method.needs_mass)
    cache = prune(prefill, DECODING.of_prompt(method).select(prefill.layers), 0)
    kept: list[tuple[int, list[Any]]] = []
    forgetting = forgetting_of(
        method,
        DECODING,
        prefill,
        cache,
        lambda choice: kept.append(
            (choice.seen, [layer.rows_held()[0][1].tolist() for layer in cache.layers])
        ),
    )
    assert forgetting is not None
    graphs = None
    if ops is not None:
        graphs = ForgettingGraphs(llm, cache, prefill.length, LONG, forgetting, ops, capture, ahead)
    tokens, stored = [choose(prefill.logits)[0]], []
    for position in range(prefill.length, prefill.length + LONG):
        forgetting.make_room(1)
        if graphs is None:
            tokens.append(choose(extend(llm, cache, tokens[-1:], position))[0])
        else:
            tokens.append(graphs.advance(tokens[-1])[0])
        layers = cache.whole_layers()
        sizes = [layer.reserved_bytes / layer.nbytes * layer.length for layer in layers]
        stored.append(sum(sizes) / len(sizes))
    return tokens, kept, stored


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("method", FORGETTING, ids=str)
def test_graphs_choose_again_and_answer_like_the_model(method: Any, ahead: bool) -> None:
    llm = tiny_llm()
    tokens, kept, stored = forgetting_answer(llm, method, PlainOps(), Computed, ahead)
    expected, theirs, _ = forgetting_answer(llm, method, None)
    assert tokens == expected
    assert len(set(tokens)) > 3
    assert len(kept) >= 3
    assert kept == theirs
    assert max(stored) <= DECODING.most


@torch.inference_mode()
def conversation(method: Any, graphs: bool, between: int, ahead: bool = False) -> list[Any]:
    """What choices left while answers, from graphs or the model's own pass, and as many tokens of
    questions took turns."""
    llm = tiny_llm()
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=method.needs_mass)
    cache = prune(prefill, DECODING.of_prompt(method).select(prefill.layers), 0)
    kept: list[Any] = []
    forgetting = forgetting_of(
        method,
        DECODING,
        prefill,
        cache,
        lambda choice: kept.append([layer.rows_held()[0][1].tolist() for layer in cache.layers]),
    )
    assert forgetting is not None
    position = prefill.length
    for _ in range(6):
        answer = ForgettingGraphs(llm, cache, position, 20, forgetting, PlainOps(), Computed, ahead)
        for token in range(5):
            forgetting.make_room(1)
            if graphs:
                answer.advance(5 + token)
            else:
                extend(llm, cache, [5 + token], position + token)
        extend(llm, cache, list(range(7, 7 + between)), position + 5, forgetting)
        position += 5 + between
    return kept


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("between", [1, 3])
@pytest.mark.parametrize("method", FORGETTING, ids=str)
def test_a_choice_reads_an_answers_queries_before_those_of_what_follows(
    method: Any, between: int, ahead: bool
) -> None:
    kept = conversation(method, True, between, ahead)
    assert len(kept) >= 2
    assert kept == conversation(method, False, between)


@torch.inference_mode()
def test_the_last_graph_takes_memory_for_the_tokens_that_still_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynamickv.decoding.forgetting.BLOCK", 1)
    llm, method = tiny_llm(), dkv.SnapKV(capacity=24)
    cache, prefill = pruned(llm, method)
    forgetting = forgetting_of(method, dkv.Decoding(budget=24, buffer=10), prefill, cache)
    assert forgetting is not None
    graphs = ForgettingGraphs(llm, cache, prefill.length, 14, forgetting, PlainOps(), Computed)
    for _ in range(14):
        forgetting.make_room(1)
        graphs.advance(5)
    assert len(forgetting.choices) == 1
    for layer in cache.whole_layers():
        assert (layer.length, layer.reserved_bytes) == (24 + 4, layer.nbytes)


@pytest.mark.parametrize(
    ("steps", "buffer", "taken"),
    [
        (LONG, None, "DecodeGraph"),
        (15, None, None),
        (LONG, 16, "ForgettingGraphs"),
        (15, 16, None),
        # The choice reads queries that one graph over many choices would not bring.
        (LONG, 15, None),
    ],
)
def test_an_answer_takes_graphs_where_they_pay_and_bring_what_a_choice_reads(
    steps: int, buffer: int | None, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def stand_in(name: str) -> Any:
        def make(llm: dkv.LoadedModel, cache: KVCache, position: int, *_: Any, **__: Any) -> Any:
            made.append(name)
            positions = itertools.count(position)
            return SimpleNamespace(
                advance=lambda token: choose(extend(llm, cache, [token], next(positions)))
            )

        return make

    for name in ("DecodeGraph", "ForgettingGraphs"):
        monkeypatch.setattr(f"dynamickv.decoding.decode.{name}", stand_in(name))
    monkeypatch.setattr("dynamickv.decoding.decode.graphable", lambda _: True)
    decoding = None if buffer is None else dkv.Decoding(budget=32, buffer=buffer)
    run = dkv.compare(
        tiny_llm(),
        DOCUMENT,
        QUESTION,
        methods=[dkv.SnapKV(capacity=24)],
        max_new_tokens=steps + 1,
        decoding=decoding,
    ).runs[0]
    assert len(run.token_ids) == steps + 1
    assert made == ([] if taken is None else [taken])


@families
def test_every_family_goes_on_compressing_in_graphs(family: str) -> None:
    llm, method = tiny_llm(family), dkv.DynamicKV(capacity=24)
    tokens, kept, _ = forgetting_answer(llm, method, PlainOps(), Computed)
    assert (tokens, kept) == forgetting_answer(llm, method, None)[:2]


# Triton kernels: on CUDA, or anywhere with TRITON_INTERPRET=1 set before the start.


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1; on CUDA the graph's tests run the kernels",
)
@families
@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_kernels_compute_what_the_plain_operations_do(
    family: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamickv.decoding.triton_ops import TritonOps

    monkeypatch.setitem(globals(), "STEPS", 3)
    llm = tiny_llm(family, num_hidden_layers=2)
    method = dkv.SnapKV(capacity=24, granularity=granularity)
    answer, expected = (stepped(llm, method, ops) for ops in (TritonOps(), PlainOps()))
    assert [token for token, _ in answer] == [token for token, _ in expected]
    assert [value for _, value in answer] == pytest.approx([v for _, v in expected], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1; on CUDA the graph's tests run the kernels",
)
def test_kernels_choose_again_like_the_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamickv.decoding.triton_ops import TritonOps

    monkeypatch.setitem(globals(), "LONG", 22)
    llm, method = tiny_llm(num_hidden_layers=2), dkv.DynamicKV(capacity=24)
    answer = forgetting_answer(llm, method, TritonOps(), Computed)
    assert len(answer[1]) >= 1
    assert answer == forgetting_answer(llm, method, PlainOps(), Computed)


def to_cuda(llm: dkv.LoadedModel) -> dkv.LoadedModel:
    llm.model.to("cuda")
    return llm


@needs_cuda
@families
@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
@pytest.mark.parametrize("ahead", [False, True])
def test_graph_decodes_like_the_model(family: str, granularity: str, ahead: bool) -> None:
    llm = to_cuda(tiny_llm(family))
    method = dkv.DynamicKV(capacity=24, granularity=granularity)
    cache, prefill = pruned(llm, method)
    graph = DecodeGraph(llm, cache, prefill.length, STEPS, ahead=ahead)
    answer = [choose(prefill.logits)]
    for _ in range(STEPS):
        answer.append(graph.advance(answer[-1][0]))
    assert_same(answer, plain(llm, method))
    assert [layer.seen for layer in cache.layers] == [prefill.length + STEPS] * len(cache.layers)


@needs_cuda
def test_decode_takes_the_graph_and_answers_in_turns() -> None:
    llm = to_cuda(tiny_llm())
    methods = [dkv.FullKV(), dkv.DynamicKV(capacity=24)]
    expected = [[token for token, _ in plain(llm, method)] for method in methods]
    streams = []
    for method in methods:
        cache, prefill = pruned(llm, method)
        streams.append(decode(llm, cache, prefill.logits, prefill.length, STEPS + 1))
    turns = list(zip(*streams, strict=True))
    assert [[turn[i].token_id for turn in turns] for i in range(2)] == expected


@needs_cuda
@pytest.mark.parametrize("tokens", [[None] * STEPS, [None, None, 5, None, 7, 7, None, None]])
def test_captured_steps_begun_ahead_choose_and_leave_the_same(tokens: list[int | None]) -> None:
    llm, method = to_cuda(tiny_llm()), dkv.DynamicKV(capacity=24)
    answers, held = [], []
    for ahead in (False, True):
        cache, prefill = pruned(llm, method)
        graph = DecodeGraph(llm, cache, prefill.length, STEPS, ahead=ahead)
        chosen = [choose(prefill.logits)]
        for token in tokens:
            chosen.append(graph.advance(chosen[-1][0] if token is None else token))
        answers.append(chosen)
        held.append(torch.stack([layer.held()[0].sum() for layer in cache.whole_layers()]))
        assert cache.layers[0].seen == prefill.length + len(tokens)
    assert answers[0] == answers[1]
    assert torch.equal(*held)


@needs_cuda
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("method", FORGETTING, ids=str)
def test_captured_graphs_choose_again_like_the_model(method: Any, ahead: bool) -> None:
    llm = to_cuda(tiny_llm())
    tokens, kept, stored = forgetting_answer(llm, method, fastest_ops(llm.device), ahead=ahead)
    expected, theirs, _ = forgetting_answer(llm, method, None)
    assert tokens == expected
    assert [seen for seen, _ in kept] == [seen for seen, _ in theirs]
    assert max(stored) <= DECODING.most
