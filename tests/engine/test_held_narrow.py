"""Keys and values in bfloat16 go wherever float32 ones go: every method, setting and way to answer
of a model that is read from packed weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import dynamickv as dkv
from dynamickv.cache import prune
from dynamickv.decoding import alignment, side_by_side
from dynamickv.decoding.asking import with_question
from dynamickv.decoding.decode import extend
from dynamickv.decoding.side_by_side import follow_all
from tests.engine.test_packed import needs_fast
from tests.engine.test_precision import both
from tests.engine.tiny import DOCUMENT, QUESTION

pytestmark = needs_fast
NARROW = ("llama", "qwen2", "qwen3")
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"granularity": "query_head"},
    {"head_budgets": "adaptive"},
    {"granularity": "query_head", "head_budgets": "adaptive"},
)


def methods(**settings: Any) -> list[dkv.CompressionMethod]:
    """Those that take the settings."""
    found = []
    for name in dkv.METHODS:
        try:
            found.append(dkv.build_method(name, capacity=24, **settings))
        except (TypeError, ValueError):
            continue
    return found


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("family", NARROW)
def test_every_method_answers_and_keeps_nearly_what_it_keeps_exactly(
    family: str, settings: dict[str, Any], aware: bool
) -> None:
    asked = methods(**settings)
    assert len(asked) > 4
    exact, fast = (
        dkv.compare(llm, DOCUMENT, QUESTION, methods=asked, max_new_tokens=4, question_aware=aware)
        for llm in both(family)
    )
    for true, run in zip(exact.runs, fast.runs, strict=True):
        assert run.kv_bytes <= true.kv_bytes * 0.6
        assert run.kv_bytes_full * 2 == true.kv_bytes_full
        size = fast.model.num_layers, fast.prompt.length
        kept, truly = run.retained.unpack(*size), true.retained.unpack(*size)
        assert (kept & truly).sum() > 0.75 * truly.sum()


def test_what_goes_on_compressing_while_it_answers_does() -> None:
    trace = dkv.compare(
        both()[1],
        DOCUMENT,
        QUESTION,
        methods=[dkv.SnapKV(capacity=24), dkv.DynamicKV(capacity=24)],
        max_new_tokens=24,
        decoding=dkv.Decoding(budget=24, buffer=8),
    )
    assert all(run.forgotten for run in trace.runs)


def test_a_conversation_goes_on_from_what_is_held() -> None:
    exact, fast = both()
    held = []
    for llm in (exact, fast):
        talk = dkv.Conversation(llm, dkv.prefill(llm, DOCUMENT, QUESTION), dkv.SnapKV(capacity=24))
        talk.answer(max_new_tokens=4)
        talk.ask("And the one after it?", max_new_tokens=4)
        held.append(talk.kv_bytes)
    assert held[1] * 2 == held[0]


def test_a_stored_document_that_is_asked_holds_no_second_copy() -> None:
    exact, fast = both()
    sizes = []
    for llm in (exact, fast):
        asked = with_question(llm, dkv.prefill(llm, DOCUMENT), QUESTION)
        assert {keys.dtype for keys in asked.keys} == {llm.held_dtype}
        for layer, keys in zip(asked.layers, asked.keys, strict=True):
            assert layer.keys.data_ptr() == keys.data_ptr()
        sizes.append(sum(keys.nbytes for keys in asked.keys))
    assert sizes[1] * 2 == sizes[0]


def test_the_models_own_pass_reads_what_is_held_in_its_own_format() -> None:
    exact, fast = both()
    logits = []
    for llm in (exact, fast):
        read = dkv.prefill(llm, DOCUMENT)
        cache = prune(read, dkv.SnapKV(capacity=24).select(read.layers), 8)
        logits.append(extend(llm, cache, [5, 6, 7], read.length))
        assert {layer.held()[0].dtype for layer in cache.whole_layers()} == {llm.held_dtype}
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()


def test_what_an_answer_read_is_told() -> None:
    exact, fast = both()
    told = []
    for llm in (exact, fast):
        read = dkv.prefill(llm, DOCUMENT, QUESTION)
        kept = [dkv.SnapKV(capacity=24).select(read.layers)]
        told.append(dkv.reads(llm, read, [5, 6, 7], kept).to_dict())
    assert told[0].keys() == told[1].keys()


def test_held_is_what_a_prefill_holds() -> None:
    for llm, dtype in zip(both(), (torch.float32, torch.bfloat16), strict=True):
        read = dkv.prefill(llm, DOCUMENT, QUESTION)
        assert llm.held_dtype == dtype
        assert {t.dtype for t in itertools.chain(read.keys, read.values)} == {dtype}


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize(
    ("settings", "decoding"),
    [*((settings, None) for settings in SETTINGS), ({}, dkv.Decoding(budget=24, buffer=8))],
)
@pytest.mark.parametrize("family", NARROW)
def test_caches_side_by_side_say_of_an_answer_what_each_says_alone(
    family: str,
    settings: dict[str, Any],
    aware: bool,
    decoding: dkv.Decoding | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = both(family)[1]
    asked = [
        dkv.FullKV(),
        dkv.SnapKV(capacity=24, **settings),
        dkv.PyramidKV(capacity=24, **settings),
    ]
    shared: list[int] = []

    def counting(*given: Any) -> Any:
        shared.append(len(given[2]))
        return follow_all(*given, block=5)

    monkeypatch.setattr(side_by_side, "follow_all", counting)
    # More than a block, and a part of one.
    options: dict[str, Any] = {"max_new_tokens": 12, "question_aware": aware, "decoding": decoding}
    together = dkv.compare(llm, DOCUMENT, QUESTION, methods=asked, **options)
    uneven = settings.get("head_budgets") == "adaptive"
    assert shared == [1 if decoding is not None or uneven else 3]
    monkeypatch.setattr(alignment, "packed_throughout", lambda llm: False)
    apart = dkv.compare(llm, DOCUMENT, QUESTION, methods=asked, **options)
    for one, other in zip(together.runs[1:], apart.runs[1:], strict=True):
        assert one.aligned is not None
        assert other.aligned is not None
        for name in ("probabilities", "probabilities_full"):
            own, wanted = getattr(one.aligned, name), getattr(other.aligned, name)
            assert own == pytest.approx(wanted, rel=0.06)
        assert (one.agreement is None) == (other.agreement is None)


def test_caches_that_memory_has_no_room_for_at_once_are_followed_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = both()[1]
    monkeypatch.setattr(alignment, "free_host_memory", lambda: 0)
    monkeypatch.setattr(side_by_side, "follow_all", None)
    asked = [dkv.FullKV(), dkv.SnapKV(capacity=24)]
    run = dkv.compare(llm, DOCUMENT, QUESTION, methods=asked, max_new_tokens=4).runs[1]
    assert run.aligned is not None
