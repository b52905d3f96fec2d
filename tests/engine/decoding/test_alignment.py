"""FullKV's words under every run's cache, held against a pass of plain transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import dynamickv as dkv
from dynamickv.reading.observe import cache_argument
from tests.engine.tiny import COMPRESSING, DOCUMENT, QUESTION, SMALL_INSTANCES, tiny_llm

COUNT = 12


@pytest.fixture(scope="module")
def trace(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> dkv.Trace:
    return dkv.compare(llm, prefill=prefill, methods=SMALL_INSTANCES, max_new_tokens=COUNT)


@torch.inference_mode()
def token_probabilities(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, answer: list[int]
) -> np.ndarray:
    """Of the answer's tokens, one step after the other on transformers' own cache."""
    cache = DynamicCache()
    for place, kept in enumerate(retention.indices):
        assert isinstance(kept, torch.Tensor)
        chosen = kept.expand(prefill.keys[place].shape[0], -1)[..., None]
        keys, values = (
            part[place].gather(1, chosen.expand(-1, -1, part[place].shape[2]))[None]
            for part in (prefill.keys, prefill.values)
        )
        cache.update(keys, values, place)
    given = cache_argument(llm.model, cache)
    logits, found = prefill.logits, []
    for step, token in enumerate(answer):
        found.append(float(logits.float().softmax(-1)[token]))
        positions = torch.tensor([[prefill.length + step]])
        output = llm.model(torch.tensor([[token]]), position_ids=positions, use_cache=True, **given)
        logits = output.logits[0, -1]
    return np.array(found)


@pytest.mark.parametrize("number", range(len(COMPRESSING)))
def test_words_have_the_probabilities_of_plain_forced_decoding(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, trace: dkv.Trace, number: int
) -> None:
    method, full = COMPRESSING[number], trace.run("FullKV")
    if getattr(method, "head_budgets", "") == "adaptive":
        pytest.skip("heads of unlike length do not fit transformers' cache")
    retention = method.select(prefill.layers)
    own = token_probabilities(llm, prefill, retention, full.token_ids)
    whole = token_probabilities(llm, prefill, dkv.FullKV().select(prefill.layers), full.token_ids)
    held = trace.run(method.name).aligned
    assert held is not None
    for index, (first, last) in enumerate(held.token_spans):
        assert held.probabilities[index] == pytest.approx(math.prod(own[first:last]), rel=1e-3)
        assert held.probabilities_full[index] == pytest.approx(
            math.prod(whole[first:last]), rel=1e-3
        )
    assert held.surviving == pytest.approx(np.mean(held.shares))


def test_words_lie_in_full_kvs_answer(trace: dkv.Trace) -> None:
    full = trace.run("FullKV")
    units = full.answer.encode("utf-16-le", "surrogatepass")
    for run in trace.runs:
        if run is full:
            assert run.aligned is None
            continue
        assert run.aligned is not None
        for (start, end), (first, last) in zip(
            run.aligned.utf16_spans, run.aligned.token_spans, strict=True
        ):
            word = units[2 * start : 2 * end].decode("utf-16-le", "surrogatepass")
            assert word == "".join(full.pieces[first:last]).strip()
            assert word


def test_a_cache_that_keeps_everything_loses_nothing(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=2 * prefill.length)]
    run = dkv.compare(llm, prefill=prefill, methods=methods, max_new_tokens=COUNT).runs[1]
    assert run.aligned is not None
    assert run.aligned.surviving == pytest.approx(1)
    assert run.aligned.loss is None
    assert set(run.aligned.instead) == {""}
    assert run.erased == 0


def test_without_a_full_kv_there_is_nothing_to_align_with(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    (run,) = dkv.compare(
        llm, prefill=prefill, methods=[dkv.SnapKV(capacity=24)], max_new_tokens=4
    ).runs
    assert run.aligned is None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_compressed_before_the_question_is_aligned_too(family: str) -> None:
    llm = tiny_llm(family)
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=24, window_size=8)]
    late = dkv.compare(
        llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=COUNT, question_aware=False
    )
    held = late.runs[1].aligned
    assert held is not None
    full = [math.exp(value) for value in late.runs[0].logprobs]
    for share, (first, last) in zip(held.probabilities_full, held.token_spans, strict=True):
        assert share == pytest.approx(math.prod(full[first:last]), rel=1e-3)


def test_erased_positions_are_kept_by_no_layer_and_no_head(trace: dkv.Trace) -> None:
    counts = []
    for run in trace.runs:
        kept = run.retained.unpack(trace.model.num_layers, trace.prompt.length)
        counts.append(sum(not kept[:, :, place].any() for place in range(trace.prompt.length)))
    assert [run.erased for run in trace.runs] == counts
    assert counts[0] == 0
    assert max(counts) > 0


def test_an_answer_longer_than_a_block_is_aligned_to_its_end(llm: dkv.LoadedModel) -> None:
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=24, window_size=8)]
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=150)
    full, held = trace.runs[0], trace.runs[1].aligned
    assert len(full.token_ids) == 150
    assert held is not None
    likely = [math.exp(value) for value in full.logprobs]
    for share, (first, last) in zip(held.probabilities_full, held.token_spans, strict=True):
        assert share == pytest.approx(math.prod(likely[first:last]), rel=1e-2)


def test_the_record_says_what_is_expected_and_where_it_is(llm: dkv.LoadedModel) -> None:
    run = dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=8).runs[0]
    said = run.answer.split()[0]
    trace = dkv.compare(
        llm,
        f"{DOCUMENT} \U0001f327 The LAST   word.",
        QUESTION,
        methods=[dkv.FullKV()],
        max_new_tokens=8,
        expected="the last word",
    )
    assert trace.expected is not None
    assert trace.expected.document_utf16_span is not None
    start, end = trace.expected.document_utf16_span
    units = trace.prompt.text.encode("utf-16-le")[2 * start : 2 * end]
    assert units.decode("utf-16-le") == "The LAST   word"
    assert trace.runs[0].expected_found is False
    missing = dkv.compare(
        llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=8, expected=said
    )
    assert missing.runs[0].expected_found is True
    assert missing.model.precision == "exact"
