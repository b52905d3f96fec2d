"""Runs decoded in one pass say what each says alone."""

from __future__ import annotations

import pytest

import dynamickv as dkv
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
