"""A comparison tells what it does in order, stops when asked, frees what it held, and records what
is true."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import dynamickv as dkv
from dynamickv.cache import KVCache
from tests.engine.methods import naive
from tests.engine.tiny import (
    COMPRESSING,
    DOCUMENT,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    heads_of,
    method_name,
    small_instances,
    tiny_llm,
)

PAIR = [dkv.FullKV(), dkv.DynamicKV(capacity=24)]


def stream(llm: dkv.LoadedModel, **settings: Any) -> Any:
    return dkv.compare_stream(
        llm, DOCUMENT, QUESTION, **{"methods": PAIR, "max_new_tokens": 5, **settings}
    )


def stop_after(llm: dkv.LoadedModel, token: int) -> dkv.LoadedModel:
    return dataclasses.replace(llm, stop_ids=frozenset([token]))


# Order of events.


def test_events_come_in_the_order_things_happen(llm: dkv.LoadedModel) -> None:
    events = list(stream(llm))
    kinds = [type(event).__name__ for event in events]
    expected = [
        *["Progress"] * (NUM_LAYERS + 1),
        *["Compressed"] * 2,
        *["Token"] * 8,
        *["Token", "RunFinished"] * 2,
        "ComparisonFinished",
    ]
    assert kinds == expected


def test_progress_is_told_for_every_layer(llm: dkv.LoadedModel) -> None:
    progress = [event for event in stream(llm) if isinstance(event, dkv.Progress)]
    assert progress == [
        dkv.Progress("prefill", layer, NUM_LAYERS) for layer in range(NUM_LAYERS + 1)
    ]


def test_progress_arrives_while_the_prefill_runs(llm: dkv.LoadedModel) -> None:
    """The second layer is not computed before the first one was told."""
    first_told = threading.Event()
    waited = []
    handle = llm.model.model.layers[3].register_forward_pre_hook(
        lambda *_: waited.append(first_told.wait(5))
    )
    try:
        for event in stream(llm):
            if isinstance(event, dkv.Progress) and event.completed == 1:
                first_told.set()
    finally:
        handle.remove()
    assert waited
    assert all(waited)


def test_runs_decode_in_lockstep_and_finished_ones_drop_out(llm: dkv.LoadedModel) -> None:
    answers = [
        run.token_ids
        for run in dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR, max_new_tokens=30).runs
    ]
    stop = next(token for token in answers[0][2:] if token not in answers[1])
    turns = [
        event.run
        for event in stream(stop_after(llm, stop), max_new_tokens=30)
        if isinstance(event, dkv.Token)
    ]
    first = answers[0].index(stop) + 1
    assert turns == [0, 1] * first + [1] * (30 - first)


def test_tokens_carry_the_text_so_far(llm: dkv.LoadedModel) -> None:
    events = list(stream(llm))
    runs = {event.run: event.record for event in events if isinstance(event, dkv.RunFinished)}
    for index, run in runs.items():
        told = [e for e in events if isinstance(e, dkv.Token) and e.run == index]
        assert [event.token_id for event in told] == run.token_ids
        assert told[-1].answer == run.answer
        texts = ["".join(run.pieces[: step + 1]) for step in range(len(run.pieces))]
        assert [event.answer for event in told] == texts
        assert {event.method for event in told} == {run.method}
        assert [event.seconds for event in told] == run.decode_seconds


def test_compressed_says_what_the_record_says(llm: dkv.LoadedModel) -> None:
    events = list(stream(llm, methods=SMALL_INSTANCES))
    runs = events[-1].trace.runs
    told = [event for event in events if isinstance(event, dkv.Compressed)]
    assert len(told) == len(SMALL_INSTANCES)
    for index, (event, run) in enumerate(zip(told, runs, strict=True)):
        assert (event.run, event.method) == (index, run.method)
        for field in ("budgets", "kept_fraction", "kv_bytes", "score_seconds", "prune_seconds"):
            assert getattr(event, field) == getattr(run, field)


def test_events_are_frozen(llm: dkv.LoadedModel) -> None:
    for event in stream(llm, max_new_tokens=1):
        field = dataclasses.fields(event)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field, None)


def test_compare_is_the_streams_last_event(llm: dkv.LoadedModel) -> None:
    streamed = list(stream(llm))[-1].trace
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR, max_new_tokens=5)
    assert [run.token_ids for run in trace.runs] == [run.token_ids for run in streamed.runs]
    assert trace.prompt == streamed.prompt


def test_a_kept_prefill_answers_without_reading_the_prompt_again(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    events = list(
        dkv.compare_stream(llm, prefill=prefill, methods=SMALL_INSTANCES, max_new_tokens=4)
    )
    assert not any(isinstance(event, dkv.Progress) for event in events)
    fresh = dkv.compare(llm, DOCUMENT, QUESTION, methods=SMALL_INSTANCES, max_new_tokens=4)
    ours = [(run.token_ids, run.retained) for run in events[-1].trace.runs]
    assert ours == [(run.token_ids, run.retained) for run in fresh.runs]


def test_methods_do_not_influence_each_other(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    together = dkv.compare(llm, prefill=prefill, methods=SMALL_INSTANCES, max_new_tokens=6)
    for method, run in zip(SMALL_INSTANCES, together.runs, strict=True):
        alone = dkv.compare(llm, prefill=prefill, methods=[method], max_new_tokens=6).runs[0]
        assert alone.token_ids == run.token_ids
        assert alone.retained == run.retained


def test_two_comparisons_at_once_do_not_disturb_each_other(llm: dkv.LoadedModel) -> None:
    documents = [DOCUMENT, DOCUMENT[200:] + "The end. " * 9]

    def answers(document: str) -> list[list[int]]:
        trace = dkv.compare(llm, document, QUESTION, methods=PAIR, max_new_tokens=12)
        return [run.token_ids for run in trace.runs]

    expected = [answers(document) for document in documents]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(answers, documents * 2)) == expected * 2


# Stopping.


def events_until(events: Iterator[Any], wanted: Callable[[Any], bool]) -> None:
    for event in events:
        if wanted(event):
            return
    raise AssertionError("it never came")


def prefill_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefill")]


def wait_until(condition: Callable[[], bool], seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def caches() -> list[KVCache]:
    return [thing for thing in gc.get_objects() if type(thing) is KVCache]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Memory must be free at once, not whenever the garbage collector happens to run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "moment",
    [
        lambda event: isinstance(event, dkv.Progress) and event.completed == 0,
        lambda event: isinstance(event, dkv.Progress) and event.completed == 2,
        lambda event: isinstance(event, dkv.Compressed),
        lambda event: isinstance(event, dkv.Token) and event.run == 1,
    ],
    ids=["before-prefill", "mid-prefill", "compressed", "mid-decode"],
)
@pytest.mark.usefixtures("no_collector")
def test_closing_stops_the_work_and_frees_the_memory(
    llm: dkv.LoadedModel, moment: Callable[[Any], bool]
) -> None:
    before = len(caches())
    events = stream(llm, max_new_tokens=500)
    events_until(events, moment)
    events.close()
    assert wait_until(lambda: not prefill_threads())
    assert len(caches()) == before


@pytest.mark.usefixtures("no_collector")
def test_a_finished_comparison_frees_its_caches(llm: dkv.LoadedModel) -> None:
    before = len(caches())
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR, max_new_tokens=2)
    assert len(caches()) == before
    assert trace.runs


@pytest.mark.usefixtures("no_collector")
def test_a_finished_run_frees_its_cache_while_others_go_on(llm: dkv.LoadedModel) -> None:
    answers = [
        run.token_ids
        for run in dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR, max_new_tokens=30).runs
    ]
    stop = next(token for token in answers[0] if token not in answers[1])
    before = len(caches())
    events = stream(stop_after(llm, stop), max_new_tokens=40)
    events_until(events, lambda event: isinstance(event, dkv.Compressed) and event.run == 1)
    running = len(caches())
    events_until(events, lambda event: isinstance(event, dkv.RunFinished))
    assert len(caches()) == running - 1
    events.close()
    assert len(caches()) == before


@pytest.mark.usefixtures("no_collector")
def test_closing_mid_prefill_frees_the_tensors_too(llm: dkv.LoadedModel) -> None:
    length = dkv.prefill(llm, DOCUMENT, QUESTION).length

    def held() -> int:
        found = 0
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor and thing.dim() >= 3 and thing.shape[-2] == length:
                found += 1
        return found

    before = held()
    events = stream(llm)
    events_until(events, lambda event: isinstance(event, dkv.Progress) and event.completed == 4)
    events.close()
    assert held() == before


def test_closing_mid_prefill_leaves_the_remaining_layers_uncomputed(
    llm: dkv.LoadedModel,
) -> None:
    computed = []
    slow = threading.Event()
    handle = llm.model.model.layers[2].register_forward_pre_hook(lambda *_: slow.wait(5) and None)
    other = llm.model.model.layers[5].register_forward_pre_hook(lambda *_: computed.append(5))
    try:
        events = stream(llm)
        events_until(events, lambda e: isinstance(e, dkv.Progress) and e.completed == 2)
        closing = threading.Thread(target=events.close)
        closing.start()
        slow.set()
        closing.join(5)
    finally:
        handle.remove()
        other.remove()
    assert not closing.is_alive()
    assert computed == []


def test_the_model_works_after_an_abandoned_comparison(llm: dkv.LoadedModel) -> None:
    expected = dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR, max_new_tokens=3)
    for stage in (dkv.Progress, dkv.Token):
        events = stream(llm)
        events_until(events, lambda event, stage=stage: isinstance(event, stage))
        events.close()
    again = dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR, max_new_tokens=3)
    assert [run.token_ids for run in again.runs] == [run.token_ids for run in expected.runs]


def test_should_stop_finishes_what_exists_as_cancelled(llm: dkv.LoadedModel) -> None:
    stop = threading.Event()
    told = 0
    for event in stream(llm, max_new_tokens=50, should_stop=stop.is_set):
        if isinstance(event, dkv.Token):
            told += 1
            if told == 7:
                stop.set()
    assert isinstance(event, dkv.ComparisonFinished)
    runs = event.trace.runs
    assert [run.finish_reason for run in runs] == ["cancelled", "cancelled"]
    assert [len(run.token_ids) for run in runs] == [4, 3]
    for run in runs:
        assert "".join(run.pieces) == run.answer
        assert len(run.pieces) == len(run.logprobs) == len(run.decode_seconds)
    assert dkv.Trace.from_dict(event.trace.to_dict()) == event.trace


def test_should_stop_before_the_first_token_leaves_empty_answers(llm: dkv.LoadedModel) -> None:
    stop = threading.Event()
    for event in stream(llm, should_stop=stop.is_set):
        if isinstance(event, dkv.Compressed):
            stop.set()
    runs = event.trace.runs
    assert [(run.answer, run.token_ids, run.finish_reason) for run in runs] == [
        ("", [], "cancelled")
    ] * 2
    assert dkv.Trace.from_dict(event.trace.to_dict()) == event.trace


def test_should_stop_during_the_prefill_ends_without_a_record(llm: dkv.LoadedModel) -> None:
    stop = threading.Event()
    events = []
    for event in stream(llm, should_stop=stop.is_set):
        events.append(event)
        if isinstance(event, dkv.Progress) and event.completed == 2:
            stop.set()
    assert all(isinstance(event, dkv.Progress) for event in events)
    assert len(events) <= NUM_LAYERS + 1
    assert not prefill_threads()


def test_a_cancelled_answer_is_no_divergence(llm: dkv.LoadedModel) -> None:
    same = [dkv.FullKV(), dkv.SnapKV(capacity=5000)]
    told: list[Any] = []
    for event in stream(llm, methods=same, max_new_tokens=50, should_stop=lambda: len(told) == 7):
        if isinstance(event, dkv.Token):
            told.append(event)
    runs = event.trace.runs
    assert len(runs[0].token_ids) > len(runs[1].token_ids) > 0
    assert runs[1].agreement is None


def test_an_error_in_the_prefill_reaches_the_caller(llm: dkv.LoadedModel) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = llm.model.model.layers[1].register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream(llm))
    finally:
        handle.remove()
    assert not prefill_threads()


# What the record says.


@pytest.fixture(scope="module")
def trace(llm: dkv.LoadedModel) -> dkv.Trace:
    methods = [*SMALL_INSTANCES, *small_instances(granularity="query_head")[1:]]
    return dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=8, scores=True)


def test_the_prompt_record_is_the_prompt(trace: dkv.Trace, prefill: dkv.Prefill) -> None:
    prompt = trace.prompt
    assert prompt.length == prefill.length == len(prompt.text_utf16_offsets)
    assert f"{DOCUMENT}\n\n{QUESTION}" in prompt.text
    start, end = prompt.document_utf16_span
    assert prompt.text[start:end] == DOCUMENT, "no character beyond the basic plane here"
    first, last = prompt.question_span
    offsets = prompt.text_utf16_offsets
    assert prompt.text[offsets[first][0] : offsets[last - 1][1]].strip() == QUESTION
    assert prompt.question == QUESTION
    assert (prompt.question_aware, prompt.truncated) == (True, False)


def test_the_model_record_is_the_model(trace: dkv.Trace) -> None:
    model = trace.model
    assert (model.name, model.revision) == ("tiny", "test")
    assert (model.num_layers, model.num_query_heads, model.num_kv_heads) == (NUM_LAYERS, 6, 2)
    assert (model.head_dim, model.max_positions) == (8, 2048)
    assert (model.dtype, model.device, model.attention) == ("float32", "cpu", "sdpa")


def test_versions_and_time_are_recorded(trace: dkv.Trace) -> None:
    assert trace.versions["dynamickv"] == dkv.__version__
    assert trace.versions["torch"] == torch.__version__
    assert {"python", "transformers"} <= set(trace.versions)
    assert trace.created.endswith("Z")
    assert len(trace.created) == len("2026-11-23T19:30:00Z")


def test_budgets_kept_fraction_and_bitset_agree(trace: dkv.Trace) -> None:
    for run in trace.runs:
        kept = run.retained.unpack(NUM_LAYERS, trace.prompt.length)
        numbers = kept.sum(axis=2)
        assert numbers.mean(axis=1).tolist() == run.budgets
        if run.method != "LAVa":  # whose heads share a layer's budget
            assert (numbers == numbers[:, :1]).all()
        assert run.kept_fraction == pytest.approx(kept.mean())
        expected = 6 if run.parameters.get("granularity") == "query_head" else 2
        assert run.retained.heads == expected


def test_kv_bytes_are_those_of_the_kept_positions(trace: dkv.Trace, prefill: dkv.Prefill) -> None:
    for run in trace.runs:
        assert run.kv_bytes == 2 * sum(run.budgets) * run.retained.heads * 8 * 4
        assert run.kv_bytes_full == prefill.kv_bytes


def test_the_retained_bits_are_the_methods_choice(trace: dkv.Trace, prefill: dkv.Prefill) -> None:
    for run in trace.runs:
        retention = dkv.build_method(run.method, **run.parameters).select(prefill.layers)
        kept = run.retained.unpack(NUM_LAYERS, trace.prompt.length)
        for layer, positions in enumerate(retention.indices):
            for head, row in enumerate(heads_of(positions)):
                assert np.flatnonzero(kept[layer, head]).tolist() == row
        assert run.budget_history == [list(update) for update in retention.budget_history]


def test_full_kv_retains_everything(trace: dkv.Trace) -> None:
    run = trace.run("FullKV")
    assert run.retained.unpack(NUM_LAYERS, trace.prompt.length).all()
    assert run.kept_fraction == 1
    assert run.kv_bytes == run.kv_bytes_full


def test_seconds_are_measured(trace: dkv.Trace) -> None:
    assert trace.prefill_seconds > 0
    for run in trace.runs:
        assert run.prune_seconds > 0
        assert run.score_seconds >= 0
        assert len(run.decode_seconds) == len(run.token_ids)
        assert min(run.decode_seconds) >= 0


def test_scores_are_recorded_on_request(trace: dkv.Trace, llm: dkv.LoadedModel) -> None:
    scored = {method.name for method in SMALL_INSTANCES if isinstance(method, dkv.ScoredMethod)}
    for run in trace.runs:
        assert (run.scores is not None) == (run.method in scored)
        if run.scores is not None:
            scores = run.scores.unpack(NUM_LAYERS, trace.prompt.length)
            assert scores.max() == 255
            assert (scores[:, -8:] == 255).all(), "the window is always kept"
            assert (scores[:, :-8].max(axis=1) == 255).all()
    assert {run.scores for run in dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR).runs} == {None}


def test_recorded_scores_rank_positions_as_the_method_does(
    trace: dkv.Trace, prefill: dkv.Prefill
) -> None:
    run = trace.run("SnapKV")
    assert run.scores is not None
    scores = run.scores.unpack(NUM_LAYERS, trace.prompt.length)[:, :-8].astype(int)
    method = dkv.SnapKV(capacity=24)
    for layer, observation in enumerate(prefill.layers):
        exact = method.score(observation).mean(dim=0).numpy()
        assert np.abs(scores[layer] - exact / exact.max() * 255).max() <= 0.5001


def test_a_prompt_that_fits_is_recorded_as_kept_whole(llm: dkv.LoadedModel) -> None:
    roomy = small_instances(capacity=500)
    for run in dkv.compare(llm, "Hi.", "Who?", methods=roomy, max_new_tokens=5).runs:
        assert run.kept_fraction == 1
        assert run.agreement is not None
        assert run.agreement.first_divergence is None


# Compressing before the question is seen.


def test_a_question_fed_later_changes_nothing_for_full_kv(llm: dkv.LoadedModel) -> None:
    aware, unaware = (
        dkv.compare(
            llm, DOCUMENT, QUESTION, methods=PAIR[:1], max_new_tokens=8, question_aware=choice
        )
        for choice in (True, False)
    )
    assert unaware.runs[0].token_ids == aware.runs[0].token_ids
    assert unaware.prompt.question_aware is False
    assert dataclasses.replace(unaware.prompt, question_aware=True) == aware.prompt


def test_answers_to_a_question_fed_later_follow_the_hand_built_attention(
    llm: dkv.LoadedModel,
) -> None:
    prefill = dkv.prefill(llm, DOCUMENT[:120], mass=True)
    assert not prefill.question_aware
    trace = dkv.compare(
        llm, prefill=prefill, question=QUESTION, methods=COMPRESSING, max_new_tokens=5
    )
    whole = dkv.prefill(llm, DOCUMENT[:120], QUESTION).prompt
    assert whole.token_ids[: prefill.length] == prefill.prompt.token_ids
    for method, run in zip(COMPRESSING, trace.runs, strict=True):
        kept = [
            [row for row in heads_of(kept) for _ in range(6 // len(kept))]
            for kept in method.select(prefill.layers).indices
        ]
        logits = naive.next_token_logits(
            llm.model, [*whole.token_ids, *run.token_ids], prefill.length, kept
        )[whole.length - 1 : -1]
        assert run.token_ids == logits.argmax(-1).tolist(), method.name


def test_one_prefill_of_a_document_answers_several_questions(llm: dkv.LoadedModel) -> None:
    prefill = dkv.prefill(llm, DOCUMENT, mass=True)
    for question in (QUESTION, "When was the pier painted, and why?"):
        kept = dkv.compare(
            llm, prefill=prefill, question=question, methods=SMALL_INSTANCES, max_new_tokens=4
        )
        fresh = dkv.compare(
            llm,
            DOCUMENT,
            question,
            methods=SMALL_INSTANCES,
            max_new_tokens=4,
            question_aware=False,
        )
        assert kept.prompt == fresh.prompt
        assert kept.prompt.question == question
        ours = [(run.token_ids, run.retained) for run in kept.runs]
        assert ours == [(run.token_ids, run.retained) for run in fresh.runs]


def test_what_follows_the_document_is_kept_and_recorded(llm: dkv.LoadedModel) -> None:
    trace = dkv.compare(
        llm,
        DOCUMENT,
        QUESTION,
        methods=SMALL_INSTANCES,
        max_new_tokens=2,
        question_aware=False,
        scores=True,
    )
    read = dkv.prefill(llm, DOCUMENT).length
    later = trace.prompt.length - read
    assert read == trace.prompt.document_span[1]
    for run in trace.runs:
        kept = run.retained.unpack(NUM_LAYERS, trace.prompt.length)
        assert kept[:, :, read:].all()
        assert kept[:, :, :read].sum(axis=2).mean(axis=1).tolist() == run.budgets
        assert run.kept_fraction == pytest.approx(kept.mean())
        assert run.kv_bytes == 2 * (sum(run.budgets) + later * NUM_LAYERS) * 2 * 8 * 4
        assert run.kv_bytes_full == 2 * NUM_LAYERS * 2 * trace.prompt.length * 8 * 4
        if run.scores is not None:
            scores = run.scores.unpack(NUM_LAYERS, trace.prompt.length)
            assert (scores[:, read - 8 :] == 255).all()
    assert dkv.Trace.from_dict(trace.to_dict()) == trace


def test_a_prefill_of_a_document_alone_asks_for_a_question(llm: dkv.LoadedModel) -> None:
    with pytest.raises(ValueError, match="this prefill holds a document alone; give a question"):
        dkv.compare(llm, prefill=dkv.prefill(llm, DOCUMENT), methods=PAIR)


@pytest.mark.parametrize("text", ["🌧️ rain", "<|im_end|> spelled", "trailing spaces  \n", "港口"])
def test_any_text_can_be_compressed_before_the_question(llm: dkv.LoadedModel, text: str) -> None:
    for document, question in ((text * 9, QUESTION), (DOCUMENT, text)):
        trace = dkv.compare(
            llm, document, question, methods=PAIR, max_new_tokens=2, question_aware=False
        )
        assert trace.prompt == dataclasses.replace(
            dkv.compare(llm, document, question, methods=PAIR, max_new_tokens=1).prompt,
            question_aware=False,
        )


# Agreement with FullKV.


def test_full_kv_agrees_with_itself(trace: dkv.Trace) -> None:
    assert trace.run("FullKV").agreement == dkv.Agreement(
        first_divergence=None, token_match=1.0, rouge_l=1.0
    )


def test_agreement_is_measured_on_the_tokens(trace: dkv.Trace) -> None:
    full = trace.run("FullKV").token_ids
    for run in trace.runs:
        assert run.agreement is not None
        same = [a == b for a, b in zip(run.token_ids, full, strict=False)]
        if run.token_ids == full:
            assert run.agreement.first_divergence is None
        else:
            assert run.agreement.first_divergence == [*same, False].index(False)
            longest = max(len(full), len(run.token_ids))
            assert run.agreement.token_match == pytest.approx(sum(same) / longest)
        assert 0 <= run.agreement.rouge_l <= 1


def test_an_answer_that_ends_early_diverges_where_it_ends(llm: dkv.LoadedModel) -> None:
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=5000)]
    runs = dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=8).runs
    from dynamickv.record.agreement import agreement

    shorter = dataclasses.replace(runs[1], token_ids=runs[1].token_ids[:5])
    assert agreement(shorter, runs[0]).first_divergence == 5
    assert agreement(shorter, runs[0]).token_match == pytest.approx(5 / 8)


def test_a_divergence_says_how_probable_both_tokens_were(
    trace: dkv.Trace, llm: dkv.LoadedModel
) -> None:
    run, full = trace.run("DynamicKV"), trace.run("FullKV")
    assert run.agreement is not None
    at, found = run.agreement.first_divergence, run.agreement.divergence
    assert at is not None
    assert found is not None
    assert found.token_ids == [run.token_ids[at], full.token_ids[at]]
    assert found.pieces == [run.pieces[at], full.pieces[at]]
    # Greedy: each cache finds its own token the more probable one, as its own decoding recorded.
    assert found.probabilities[0] > found.probabilities[1]
    assert found.probabilities_full[1] > found.probabilities_full[0]
    assert found.probabilities[0] == pytest.approx(np.exp(run.logprobs[at]), rel=1e-4)
    assert found.probabilities_full[1] == pytest.approx(np.exp(full.logprobs[at]), rel=1e-4)
    later = dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR, question_aware=False)
    agreed = later.run("DynamicKV").agreement
    assert agreed is not None
    assert agreed.divergence is not None
    assert agreed.divergence.probabilities[0] == pytest.approx(
        np.exp(later.run("DynamicKV").logprobs[agreed.first_divergence]), rel=1e-4
    )


def test_a_run_added_later_is_the_run_it_would_have_been(llm: dkv.LoadedModel) -> None:
    kept: list[dkv.Prefill] = []
    events = stream(llm, on_prefill=kept.append)
    first = [event for event in events][-1].trace
    added = dkv.SnapKV(capacity=40)
    *_, last = dkv.compare_stream(
        llm, prefill=kept[0], methods=[added], max_new_tokens=5, earlier=first.runs
    )
    alone = dkv.compare(
        llm, DOCUMENT, QUESTION, methods=[dkv.FullKV(), added], max_new_tokens=5
    ).run("SnapKV")
    assert last.trace.runs[:2] == first.runs
    run = last.trace.run("SnapKV")
    assert (run.token_ids, run.retained, run.agreement) == (
        alone.token_ids,
        alone.retained,
        alone.agreement,
    )
    # What is chosen without answering is what answering chooses.
    seen = dkv.preview(added, kept[0])
    assert dkv.Retained.pack(seen.mask) == run.retained
    assert (seen.budgets, seen.kv_bytes, seen.kept_fraction) == (
        run.budgets,
        run.kv_bytes,
        run.kept_fraction,
    )


def test_without_full_kv_there_is_no_agreement(llm: dkv.LoadedModel) -> None:
    runs = dkv.compare(llm, DOCUMENT, QUESTION, methods=PAIR[1:], max_new_tokens=2).runs
    assert [run.agreement for run in runs] == [None]


# Bad input.


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"document": ""}, "the document is empty"),
        ({"document": " \n "}, "the document is empty"),
        ({"document": None}, "the document must be text"),
        ({"question": ""}, "the question is empty"),
        ({"question": "\t"}, "the question is empty"),
        ({"document": 7}, "the document must be text, got int"),
        ({"methods": []}, r"no method to compare; choose from FullKV"),
        ({"methods": ["FullKV"]}, "'FullKV' is not a method; give instances"),
        ({"methods": [dkv.FullKV]}, "is not a method; give instances"),
        ({"methods": dkv.FullKV()}, "methods must be a list, got FullKV alone"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": -1}, "got -1"),
        ({"max_new_tokens": 2.5}, r"got 2\.5"),
        ({"max_new_tokens": True}, "got True"),
        ({"max_new_tokens": "9"}, "got '9'"),
        ({"document": "long " * 5000}, r"the prompt has [\d,]+ tokens and this model reads 2,048"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    llm: dkv.LoadedModel, settings: dict[str, Any], sentence: str
) -> None:
    arguments = {"document": DOCUMENT, "question": QUESTION, "methods": PAIR, **settings}
    with pytest.raises(ValueError, match=sentence) as refusal:
        dkv.compare(llm, **arguments)
    assert "\n" not in str(refusal.value)
    assert not prefill_threads()


def test_a_prefill_and_a_document_together_are_refused(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    for texts in ({"document": DOCUMENT}, {"question": QUESTION}):
        with pytest.raises(ValueError, match=r"part of th(e|is) prefill"):
            dkv.compare(llm, methods=PAIR, prefill=prefill, **texts)


def test_a_window_wider_than_a_kept_prefill_says_what_to_do(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    wide = dkv.SnapKV(capacity=100, window_size=80)
    with pytest.raises(ValueError, match="prefill with tail=80 or lower window_size"):
        dkv.compare(llm, prefill=prefill, methods=[wide])
    assert dkv.compare(llm, DOCUMENT, QUESTION, methods=[wide], max_new_tokens=1).runs


def test_a_long_document_is_cut_in_the_middle_when_asked(llm: dkv.LoadedModel) -> None:
    document = "".join(f"Line {number} of the log. " for number in range(400))
    trace = dkv.compare(llm, document, QUESTION, methods=PAIR, max_new_tokens=2, truncate=True)
    assert trace.prompt.truncated
    assert trace.prompt.length <= 2048 < trace.prompt.original_length
    assert "Line 0 of" in trace.prompt.text
    assert "Line 399 of" in trace.prompt.text
    assert dkv.Trace.from_dict(trace.to_dict()) == trace


def test_a_document_far_too_long_still_leaves_room_for_whole_answers(llm: dkv.LoadedModel) -> None:
    document = "".join(f"Line {number} of the log. " for number in range(400))
    trace = dkv.compare(llm, document, QUESTION, methods=PAIR, max_new_tokens=20, truncate=True)
    assert trace.prompt.length <= 2048 - 20
    for run in trace.runs:
        assert len(run.token_ids) == 20 or run.finish_reason == "stop"


def test_hostile_text_passes_through_a_comparison(llm: dkv.LoadedModel) -> None:
    document = "a\ud83cb <script>\x00\u202e</script> 🌧️ <|im_end|>" * 3
    trace = dkv.compare(llm, document, "\udf27 why?", methods=PAIR, max_new_tokens=3)
    assert dkv.Trace.from_dict(trace.to_dict()) == trace


@pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
def test_eager_and_sdpa_give_the_same_answer(method: Any) -> None:
    answers = [
        dkv.compare(
            tiny_llm(attention=attention), DOCUMENT, QUESTION, methods=[method], max_new_tokens=9
        )
        .runs[0]
        .token_ids
        for attention in ("sdpa", "eager")
    ]
    assert answers[0] == answers[1]
