"""Answers from pruned caches equal a hand-built attention over the same positions; answers from
whole caches equal transformers' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dynamickv as dkv
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode import TextStream, choose, decode
from dynamickv.reading.observe import observed
from tests.engine.methods import naive
from tests.engine.tiny import (
    COMPRESSING,
    DOCUMENT,
    FAMILIES,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    small_instances,
    tiny_llm,
    tiny_model,
    tiny_sentencepiece_tokenizer,
    tiny_tokenizer,
)

NEW_TOKENS = 24
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def generated(model: Any, token_ids: list[int], max_new_tokens: int = NEW_TOKENS) -> list[int]:
    """Greedy answer of the plain model by transformers' own generate."""
    prompt = torch.tensor([token_ids])
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tiny_tokenizer().eos_token_id,
            pad_token_id=0,
        )
    answer: list[int] = output[0, len(token_ids) :].tolist()
    return answer


@attentions
@pytest.mark.parametrize("family", FAMILIES)
def test_full_kv_decodes_exactly_like_generate(family: str, attention: str) -> None:
    llm = tiny_llm(family, attention)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    trace = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=NEW_TOKENS)
    expected = generated(tiny_model(family, attention), prefill.prompt.token_ids)
    assert trace.runs[0].token_ids == expected
    assert len(set(expected)) > 4, "an answer that repeats one token would prove little"


def test_logprobs_are_those_of_generate(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    run = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=5).runs[0]
    prompt = torch.tensor([[*prefill.prompt.token_ids, *run.token_ids]])
    with torch.inference_mode():
        logprobs = tiny_model()(prompt).logits[0].log_softmax(-1)
    expected = [
        logprobs[prefill.length - 1 + step, token].item()
        for step, token in enumerate(run.token_ids)
    ]
    assert run.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_method_with_room_for_the_prompt_answers_like_full_kv(family: str) -> None:
    llm = tiny_llm(family)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    full = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=NEW_TOKENS)
    roomy = [
        *small_instances(capacity=prefill.length),
        *small_instances(capacity=5000, granularity="query_head"),
    ]
    trace = dkv.compare(llm, prefill=prefill, methods=roomy, max_new_tokens=NEW_TOKENS)
    for run in trace.runs:
        assert run.token_ids == full.runs[0].token_ids, run.parameters
        assert run.kept_fraction == 1
        assert run.budget_history == []


# Pruned caches against the hand-built attention.

ROUNDING = {"rtol": 0, "atol": 1e-4}
"""The models compute in float32."""


def kept_per_query_head(retention: dkv.Retention, query_heads: int) -> list[list[list[int]]]:
    return [
        [kept[head * len(kept) // query_heads].tolist() for head in range(query_heads)]
        for kept in retention.indices
    ]


def fed(llm: dkv.LoadedModel, cache: KVCache, tokens: list[int], position: int) -> Tensor:
    """Logits after each of the tokens, fed at once, (n, vocabulary)."""
    with torch.inference_mode(), observed(llm.model):
        positions = torch.arange(position, position + len(tokens))[None]
        logits: Tensor = llm.model(
            torch.tensor([tokens]), position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[0]
    return logits


CASES = [
    pytest.param(family, method, id=f"{family}-{method.name}-{name}")
    for name, settings in (
        ("kv_head", {}),
        ("query_head", {"granularity": "query_head"}),
        ("adaptive", {"head_budgets": "adaptive"}),
        ("adaptive-query_head", {"head_budgets": "adaptive", "granularity": "query_head"}),
    )
    for family in ("llama", "qwen2")
    for method in small_instances(**settings)
    if method.name != "FullKV" and all(hasattr(method, setting) for setting in settings)
]


@attentions
@pytest.mark.parametrize(("family", "method"), CASES)
def test_pruned_decoding_equals_a_hand_built_attention(
    family: str, method: Any, attention: str
) -> None:
    """Tokens fed one by one, and three at once, to layers that hold different numbers of
    positions."""
    llm = tiny_llm(family, attention)
    prefill = dkv.prefill(llm, DOCUMENT[:120], QUESTION, mass=True)
    retention = method.select(prefill.layers)
    assert retention.kept_fraction < 0.8
    new = [40, 301, 7, 99, 12]
    expected = naive.next_token_logits(
        llm.model,
        [*prefill.prompt.token_ids, *new],
        prefill.length,
        kept_per_query_head(retention, 6),
    )[-len(new) :]

    cache = prune(prefill, retention, room=2)
    singly = [fed(llm, cache, [token], prefill.length + i)[0] for i, token in enumerate(new)]
    np.testing.assert_allclose(torch.stack(singly), expected, **ROUNDING)

    cache = prune(prefill, retention, room=0)
    first = fed(llm, cache, new[:3], prefill.length)
    then = fed(llm, cache, new[3:], prefill.length + 3)
    np.testing.assert_allclose(torch.cat([first, then]), expected, **ROUNDING)


def test_the_hand_built_attention_notices_a_single_position(llm: dkv.LoadedModel) -> None:
    """Otherwise the comparison above would prove little."""
    prefill = dkv.prefill(llm, DOCUMENT[:120], QUESTION)
    kept = kept_per_query_head(dkv.SnapKV(capacity=24).select(prefill.layers), 6)
    tokens = [*prefill.prompt.token_ids, 40]
    whole = naive.next_token_logits(llm.model, tokens, prefill.length, kept)[-1]
    for position in kept[2][4]:
        fewer = [[list(row) for row in rows] for rows in kept]
        fewer[2][4].remove(position)
        less = naive.next_token_logits(llm.model, tokens, prefill.length, fewer)[-1]
        assert np.abs(whole - less).max() > 10 * ROUNDING["atol"], position


@pytest.mark.parametrize("together", [True, False])
@attentions
def test_recorded_answers_follow_the_hand_built_attention(attention: str, together: bool) -> None:
    llm = tiny_llm("llama", attention)
    prefill = dkv.prefill(llm, DOCUMENT[:120], QUESTION, mass=True)
    groups = [COMPRESSING] if together else [[method] for method in COMPRESSING]
    runs = [
        run
        for methods in groups
        for run in dkv.compare(llm, prefill=prefill, methods=methods, max_new_tokens=8).runs
    ]
    for method, run in zip(COMPRESSING, runs, strict=True):
        kept = kept_per_query_head(method.select(prefill.layers), 6)
        logits = naive.next_token_logits(
            llm.model, [*prefill.prompt.token_ids, *run.token_ids], prefill.length, kept
        )[prefill.length - 1 : -1]
        assert run.token_ids == logits.argmax(-1).tolist()


def test_pruning_does_change_the_answers(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    """Otherwise the comparisons above would prove little."""
    trace = dkv.compare(llm, prefill=prefill, methods=SMALL_INSTANCES, max_new_tokens=NEW_TOKENS)
    assert len({tuple(run.token_ids) for run in trace.runs}) > 2


def test_layers_of_a_pruned_cache_differ_in_length(prefill: dkv.Prefill) -> None:
    retention = dkv.DynamicKV(capacity=24).select(prefill.layers)
    assert len(set(retention.budgets)) > 1
    cache = prune(prefill, retention, room=2)
    assert [layer.length for layer in cache.layers] == retention.budgets
    assert cache.get_seq_length() == prefill.length


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_a_pruned_cache_holds_the_retained_rows(prefill: dkv.Prefill, granularity: str) -> None:
    retention = dkv.SnapKV(capacity=24, granularity=granularity).select(prefill.layers)
    cache = prune(prefill, retention, room=2)
    for index, kept in enumerate(retention.indices):
        keys, values = cache.layers[index].held()
        for head, positions in enumerate(kept):
            group = kept.shape[0] // 2
            assert torch.equal(keys[0, head], prefill.layers[index].keys[head // group][positions])
            assert torch.equal(values[0, head], prefill.values[index][head // group][positions])


@pytest.mark.parametrize("room", [0, 1, 300])
def test_a_cache_grows_past_its_room_without_losing_anything(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, room: int
) -> None:
    retention = dkv.DynamicKV(capacity=24).select(prefill.layers)
    cache = prune(prefill, retention, room=room)
    before = [layer.held()[0].clone() for layer in cache.layers]
    tokens = list(range(10, 10 + 260))
    for start in range(0, 260, 130):
        fed(llm, cache, tokens[start : start + 130], prefill.length + start)
    for layer, held in zip(cache.layers, before, strict=True):
        assert layer.length == held.shape[2] + 260
        assert torch.equal(layer.held()[0][:, :, : held.shape[2]], held)
    assert cache.get_seq_length() == prefill.length + 260


def test_bytes_are_the_sum_of_the_tensors(prefill: dkv.Prefill) -> None:
    cache = prune(prefill, dkv.DynamicKV(capacity=24).select(prefill.layers), room=50)
    held = [tensor for layer in cache.layers for tensor in layer.held()]
    assert cache.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert prefill.kv_bytes == 2 * NUM_LAYERS * 2 * prefill.length * 8 * 4


def test_a_sliding_window_model_is_refused() -> None:
    """Its layers would need masks of their own, and answers be silently wrong."""
    model = tiny_model("mistral", sliding_window=16)
    with pytest.raises(
        ValueError, match="sliding_attention in all layers, so nothing is left to compress"
    ):
        dkv.LoadedModel.wrap(model, tiny_tokenizer(), "sliding", "test")


# Where answers end.


def stopping(llm: dkv.LoadedModel, *tokens: int, limit: int | None = None) -> dkv.LoadedModel:
    geometry = llm.geometry
    if limit is not None:
        geometry = dataclasses.replace(geometry, max_positions=limit)
    return dataclasses.replace(llm, stop_ids=frozenset(tokens), geometry=geometry)


def test_an_answer_ends_with_the_stop_token(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    free = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=9).runs[0]
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 9
    stop = free.token_ids[5]
    run = dkv.compare(
        stopping(llm, stop), prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=9
    ).runs[0]
    assert run.finish_reason == "stop"
    assert run.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def test_one_new_token_needs_no_decoding(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    run = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=1).runs[0]
    assert run.token_ids == [int(prefill.logits.argmax())]


@pytest.mark.parametrize("free", [0, 1, 3])
def test_an_answer_ends_at_the_models_last_position(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, free: int
) -> None:
    short = stopping(llm, limit=prefill.length + free)
    run = dkv.compare(short, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=9).runs[0]
    assert run.finish_reason == "length"
    assert len(run.token_ids) == free + 1


def test_several_stop_tokens_of_a_model_are_all_used_and_the_chats_own() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    wrapped = dkv.LoadedModel.wrap(model, tokenizer, "tiny", "test")
    assert wrapped.stop_ids == {7, 9, tokenizer.eos_token_id}


def test_the_log_probability_is_natural_and_the_choice_greedy() -> None:
    token_id, logprob = choose(torch.tensor([0.0, 2.0, 1.0]))
    assert token_id == 1
    assert logprob == pytest.approx(np.log(np.exp(2) / (1 + np.exp(2) + np.exp(1))))


def test_closing_the_decoding_midway_is_clean(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    cache = prune(prefill, dkv.FullKV().select(prefill.layers), room=8)
    steps = decode(llm, cache, prefill.logits, prefill.length, 8)
    next(steps)
    next(steps)
    steps.close()
    assert cache.get_seq_length() == prefill.length + 1


# Text of an answer, token by token.

ANSWERS = {
    "ascii": "The pier was green. ",
    "emoji": "Rain 🌧️ and 👩‍👩‍👧‍👦!",
    "cjk": "灯塔由冈村女士看守。",
    "ends in the middle of nothing": "abc é",
    "replacement characters": "a\ufffdb\ufffd\ufffdc\ufffd",
    "leading and inner spaces": "  two  spaces\n\n",
    "right to left": "המגדלור פועל",
}


@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS)
def test_pieces_concatenate_to_the_answer(llm: dkv.LoadedModel, text: str) -> None:
    token_ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(llm)
    pieces = []
    for index, token_id in enumerate(token_ids):
        pieces.append(stream.push(token_id, final=index == len(token_ids) - 1))
        assert text.startswith(stream.text)
        assert stream.text == "".join(pieces)
    assert stream.text == text
    assert stream.pieces == pieces


@pytest.mark.parametrize("text", [text.strip() for text in ANSWERS.values()], ids=ANSWERS)
def test_pieces_concatenate_with_a_tokenizer_that_marks_words(
    llm: dkv.LoadedModel, text: str
) -> None:
    other = dataclasses.replace(llm, tokenizer=tiny_sentencepiece_tokenizer())
    token_ids = other.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(other)
    for index, token_id in enumerate(token_ids):
        stream.push(token_id, final=index == len(token_ids) - 1)
    assert stream.text == text
    assert "".join(stream.pieces) == text


def test_a_character_split_over_tokens_appears_with_its_last(llm: dkv.LoadedModel) -> None:
    token_ids = llm.tokenizer("🌧", add_special_tokens=False)["input_ids"]
    assert len(token_ids) == 4
    stream = TextStream(llm)
    assert [stream.push(token_id, final=False) for token_id in token_ids] == ["", "", "", "🌧"]


def test_an_answer_cut_inside_a_character_says_so(llm: dkv.LoadedModel) -> None:
    token_ids = llm.tokenizer("a🌧", add_special_tokens=False)["input_ids"][:-1]
    stream = TextStream(llm)
    for index, token_id in enumerate(token_ids):
        stream.push(token_id, final=index == len(token_ids) - 1)
    assert stream.text.rstrip("\ufffd") == "a"
    assert stream.text != "a"


def test_bytes_that_are_no_character_do_not_silence_what_follows(llm: dkv.LoadedModel) -> None:
    broken = llm.tokenizer("🌧", add_special_tokens=False)["input_ids"][1]
    stream = TextStream(llm)
    for token_id in [broken, *llm.tokenizer("light", add_special_tokens=False)["input_ids"]]:
        stream.push(token_id, final=False)
    assert stream.text == "\ufffdlight"


def test_stop_tokens_add_no_text(llm: dkv.LoadedModel) -> None:
    stream = TextStream(llm)
    for token_id in llm.tokenizer("yes<|im_end|>", add_special_tokens=False)["input_ids"]:
        stream.push(token_id, final=False)
    assert stream.text == "yes"
    assert stream.pieces[-1] == ""
