"""A follow-up question continues the compressed cache as if everything had been said at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import dynamickv as dkv
from dynamickv import conversation
from dynamickv.decoding.decode import Step
from dynamickv.reading.template import follow_up_ids
from tests.engine.tiny import DOCUMENT, QUESTION, small_instances


def test_a_full_conversation_equals_reading_it_all_at_once(llm: dkv.LoadedModel) -> None:
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    run = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=5).runs[0]
    follow_up = follow_up_ids(llm.tokenizer, "and then?")
    if follow_up[0] == run.token_ids[-1]:
        follow_up = follow_up[1:]
    whole = torch.tensor([[*prefill.prompt.token_ids, *run.token_ids, *follow_up]])
    expected = llm.model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=5, do_sample=False
    )[0, whole.shape[1] :]
    talk = dkv.Conversation(llm, prefill, dkv.FullKV())
    assert talk.answer(max_new_tokens=5) == run.answer
    answer = talk.ask("and then?", max_new_tokens=5)
    assert answer == llm.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("method", small_instances(), ids=lambda method: method.name)
def test_the_cache_grows_by_what_is_said_and_nothing_else(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, method: dkv.CompressionMethod
) -> None:
    talk = dkv.Conversation(llm, prefill, method)
    before = talk.kv_bytes
    per_token = before // sum(head.numel() for kept in talk.retention.indices for head in kept)
    heads = sum(len(kept) for kept in talk.retention.indices)
    talk.answer(max_new_tokens=3)
    talk.ask("and then?", max_new_tokens=1)
    # Of each answer the last token has not been fed yet.
    said = 2 + 1 + len(follow_up_ids(llm.tokenizer, "and then?"))
    assert (talk.kv_bytes - before) // (per_token * heads) == said


def test_a_follow_up_before_the_first_answer_is_refused(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    with pytest.raises(ValueError, match="call answer"):
        dkv.Conversation(llm, prefill, dkv.FullKV()).ask("and then?")


def test_a_document_alone_is_no_conversation(llm: dkv.LoadedModel) -> None:
    with pytest.raises(ValueError, match="starts with a question"):
        dkv.Conversation(llm, dkv.prefill(llm, DOCUMENT), dkv.FullKV())


def test_special_tokens_in_a_follow_up_are_plain_text(llm: dkv.LoadedModel) -> None:
    special = llm.tokenizer.eos_token
    plain = follow_up_ids(llm.tokenizer, "stop")
    spelled = follow_up_ids(llm.tokenizer, f"stop{special}")
    assert spelled.count(llm.tokenizer.eos_token_id) == plain.count(llm.tokenizer.eos_token_id)


def test_an_answer_taken_as_given_leads_to_the_same_next_answer(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    run = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=5).runs[0]
    decoded = dkv.Conversation(llm, prefill, dkv.FullKV())
    decoded.answer(max_new_tokens=5)
    given = dkv.Conversation(llm, prefill, dkv.FullKV())
    given.said(run.token_ids)
    assert given.kv_bytes == decoded.kv_bytes
    assert given.ask("and then?", 6) == decoded.ask("and then?", 6)


def test_an_answer_is_given_once_and_has_tokens(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    talk = dkv.Conversation(llm, prefill, dkv.FullKV())
    with pytest.raises(ValueError, match="no tokens"):
        talk.said([])
    talk.said([3, 4])
    with pytest.raises(ValueError, match="answered already"):
        talk.said([3, 4])


def test_the_end_of_an_answer_is_not_said_twice(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    end, *asked = follow_up_ids(llm.tokenizer, "and then?")
    per_position = prefill.kv_bytes // prefill.length
    for last, fed in ((end, 1 + len(asked)), (end - 1, 2 + len(asked))):
        talk = dkv.Conversation(llm, prefill, dkv.FullKV())
        talk.said([3, last])
        before = talk.kv_bytes
        talk.ask("and then?", max_new_tokens=1)
        assert talk.kv_bytes - before == fed * per_position


def test_a_question_beyond_the_models_last_position_is_refused(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    asked = len(follow_up_ids(llm.tokenizer, "and then?"))
    short = replace(llm, geometry=replace(llm.geometry, max_positions=prefill.length + 2 + asked))
    talk = dkv.Conversation(short, prefill, dkv.FullKV())
    talk.said([3, 4, 5])
    with pytest.raises(ValueError, match="start a new one"):
        talk.ask("and then? and then?")
    assert talk.kv_bytes == (prefill.length + 2) * (prefill.kv_bytes // prefill.length)


DECODING = dkv.Decoding(budget=32, buffer=8)


def test_a_capacity_above_budget_and_buffer_is_the_budget_for_the_prompt_too(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    talks = [
        dkv.Conversation(llm, prefill, dkv.SnapKV(capacity=capacity), DECODING)
        for capacity in (60, 32)
    ]
    kept = [
        [heads.tolist() for heads in talk.retention.indices if isinstance(heads, torch.Tensor)]
        for talk in talks
    ]
    assert kept[0] == kept[1] != []
    assert talks[0].choices == []


def test_a_conversation_that_goes_on_compressing_never_holds_more_than_budget_and_buffer(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    method = dkv.DynamicKV(capacity=24)
    talk = dkv.Conversation(llm, prefill, method, DECODING)
    sizes: list[int] = []
    handle = llm.model.register_forward_hook(lambda *_: sizes.append(talk.kv_bytes))
    try:
        first = talk.answer(max_new_tokens=30)
        said = [talk.ask(asked, max_new_tokens=20) for asked in ("and then?", "why " * 12)]
    finally:
        handle.remove()
    assert first == (
        dkv.compare(llm, prefill=prefill, methods=[method], max_new_tokens=30, decoding=DECODING)
        .runs[0]
        .answer
    )
    assert all(said)
    assert len(talk.choices) > 4
    per_position = prefill.kv_bytes / prefill.length
    assert talk.kv_bytes <= 40 * per_position
    assert sizes
    assert max(sizes) <= 40 * per_position


def test_a_conversation_with_room_for_everything_says_what_a_full_one_says(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    full = dkv.Conversation(llm, prefill, dkv.FullKV())
    roomy = dkv.Conversation(
        llm, prefill, dkv.SnapKV(capacity=999), dkv.Decoding(budget=999, buffer=8)
    )
    for talk in (full, roomy):
        talk.answer(max_new_tokens=9)
    assert full.ask("and then?", 9) == roomy.ask("and then?", 9)
    assert full.kv_bytes == roomy.kv_bytes
    assert roomy.choices == []


def test_an_answer_taken_as_given_is_forgotten_as_one_that_was_decoded(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    method = dkv.DynamicKV(capacity=24)
    run = dkv.compare(
        llm, prefill=prefill, methods=[method], max_new_tokens=30, decoding=DECODING
    ).runs[0]
    decoded, given = (dkv.Conversation(llm, prefill, method, DECODING) for _ in range(2))
    decoded.answer(max_new_tokens=30)
    given.said(run.token_ids)
    assert [choice.seen for choice in given.choices] == [c.seen for c in decoded.choices] != []
    assert given.kv_bytes == decoded.kv_bytes
    assert given.ask("and then?", 12) == decoded.ask("and then?", 12)


def test_a_method_that_cannot_choose_again_starts_no_such_conversation(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    with pytest.raises(ValueError, match="leave decoding out"):
        dkv.Conversation(llm, prefill, dkv.CAKE(capacity=24), DECODING)


def test_a_model_that_caches_a_latent_starts_no_such_conversation(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    latent = replace(llm, geometry=replace(llm.geometry, joint=True))
    with pytest.raises(ValueError, match="caches a latent"):
        dkv.Conversation(latent, prefill, dkv.SnapKV(capacity=24), DECODING)
    with pytest.raises(ValueError, match="caches a latent"):
        dkv.compare(latent, prefill=prefill, methods=[dkv.SnapKV(capacity=24)], decoding=DECODING)


def test_steps_may_begin_before_their_token_is_read(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    steps = conversation.decode

    def note(*arguments: Any, **options: Any) -> Iterator[Step]:
        told.append(options["ahead"])
        return steps(*arguments, **options)

    monkeypatch.setattr(conversation, "decode", note)
    talk = dkv.Conversation(llm, prefill, dkv.FullKV())
    talk.answer(max_new_tokens=3)
    talk.ask("and then?", max_new_tokens=3)
    assert told == [True, True]
