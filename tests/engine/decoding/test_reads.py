"""What an answer reads, held against the attention weights that models return themselves."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

import dynamickv as dkv
from benchmarks.coverage.tiny import NAMES, tiny_model
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt
from tests.engine.tiny import COMPRESSING, DOCUMENT, QUESTION, method_name, tiny_llm, tiny_tokenizer

ANSWER = [7, 30, 12, 81, 45, 7, 60]
LENGTH = 40
KINDS = {
    "full attention": "llama",
    "sliding windows": "gemma3_text",
    "chunked attention": "llama4_text",
    "linear attention": "qwen3_next",
    "state spaces": "jamba",
    "attention beside a state": "falcon_h1",
    "layers without attention": "nemotron_h",
    "shared keys and values": "gemma3n_text",
    "a latent": "deepseek_v3",
    "learned sinks": "gpt_oss",
    "capped logits": "gemma2",
}


def of_kind(name: str, attention: str | None = None) -> dkv.LoadedModel:
    if name not in CONFIG_MAPPING or name not in NAMES:
        pytest.skip(f"this transformers has no {name}")
    return dkv.LoadedModel.wrap(tiny_model(name, attention), tiny_tokenizer(), name, "test")


def letters(length: int = LENGTH) -> EncodedPrompt:
    """A prompt of so many tokens, a letter each, all but the ends of it document."""
    return EncodedPrompt(
        token_ids=list(range(3, 3 + length)),
        text="a" * length,
        offsets=[(place, place + 1) for place in range(length)],
        document_span=(2, length - 5),
        document_characters=(2, length - 5),
        question_span=(length - 4, length - 1),
        question="a",
        original_length=length,
    )


@torch.inference_mode()
def own_weights(name: str, tokens: list[int]) -> list[torch.Tensor]:
    """The model's own eager weights, (query heads, tokens, tokens) of every layer that attends."""
    model = tiny_model(name, "eager")
    output = model(torch.tensor([tokens]), output_attentions=True, use_cache=False)
    return [weights[0].float() for weights in output.attentions if weights is not None]


def shares_of(read: dkv.Reads) -> np.ndarray:
    """(tokens, layers, positions), zero where a position is not among the strongest."""
    tokens, layers, _ = read.index.shape
    whole = np.zeros((tokens, layers, read.positions))
    values = (read.share / 255.0) ** 2
    for token in range(tokens):
        for layer in range(layers):
            np.maximum.at(whole[token, layer], read.index[token, layer], values[token, layer])
    return whole


@pytest.mark.parametrize("attention", [None, "eager"], ids=["as loaded", "eager"])
@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_reads_are_the_models_own_weights_with(name: str, attention: str | None) -> None:
    llm, prompt = of_kind(name, attention), letters()
    prefill = prefill_prompt(llm, prompt)
    read = dkv.reads(llm, prefill, ANSWER)
    weights = own_weights(name, [*prompt.token_ids, *ANSWER[:-1]])
    assert len(weights) == len(read.layers)
    found = shares_of(read)
    first, last = prompt.document_span
    for number, place in enumerate(read.layers):
        rows = weights[number].mean(dim=0)[LENGTH - 1 :, :LENGTH].numpy()
        # The first token's step lies in the prefill, which keeps queries of compressed layers only.
        known = 0 if place in prefill.places else 1
        np.testing.assert_allclose(
            np.sqrt(found[known:, number]), np.sqrt(rows[known:]), atol=0.51 / 255 + 1e-4
        )
        document = rows[known:, first:last].sum(axis=1)
        np.testing.assert_allclose(
            read.document[known:, number] / 255, document, atol=0.51 / 255 + 1e-4
        )


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_what_survives_is_the_share_of_the_attention_on_kept_positions(method: Any) -> None:
    llm, prompt = of_kind("llama"), letters()
    prefill = prefill_prompt(llm, prompt, mass=True)
    retention = method.select(prefill.layers)
    read = dkv.reads(llm, prefill, ANSWER, [retention])
    first, last = prompt.document_span
    weights = own_weights("llama", [*prompt.token_ids, *ANSWER[:-1]])
    for number in range(len(read.layers)):
        rows = weights[number][:, LENGTH - 1 :, first:last]
        kept = torch.zeros(rows.shape[0], LENGTH)
        heads = retention.indices[number]
        for head in range(rows.shape[0]):
            kept[head, heads[head * len(heads) // rows.shape[0]]] = 1
        held = (rows * kept[:, None, first:last]).sum(dim=(0, 2)) / rows.sum(dim=(0, 2))
        np.testing.assert_allclose(read.surviving[0][:, number] / 255, held, atol=0.51 / 255 + 1e-4)
    assert read.surviving[0].min() < 255


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_runs_bits_say_the_same_as_its_retention(family: str) -> None:
    llm = tiny_llm(family)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    method = dkv.SnapKV(capacity=24, window_size=8)
    trace = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV(), method], max_new_tokens=8)
    bits = trace.runs[1].retained.unpack(6, trace.prompt.length)
    answer = trace.runs[0].token_ids
    read = dkv.reads(llm, prefill, answer, [method.select(prefill.layers), bits])
    np.testing.assert_array_equal(read.surviving[0], read.surviving[1])
    others = [read.layers.index(place) for place in llm.geometry.uncompressed]
    assert (read.surviving[0][:, others] == 255).all()


def test_a_question_that_follows_a_document_is_read_first(llm: dkv.LoadedModel) -> None:
    whole = dkv.prefill(llm, DOCUMENT, QUESTION)
    alone = dkv.prefill(llm, DOCUMENT)
    one = dkv.reads(llm, whole, ANSWER)
    other = dkv.reads(llm, alone, ANSWER, question=QUESTION)
    assert one.positions == other.positions == whole.length
    np.testing.assert_allclose(shares_of(one), shares_of(other), atol=0.02)


def test_the_strongest_positions_come_first_and_their_number_follows_the_room(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = dkv.reads(llm, prefill, ANSWER)
    assert (np.diff(read.share.astype(int), axis=2) <= 0).all()
    monkeypatch.setattr("dynamickv.decoding.reads.SENT_BYTES", 4 * len(ANSWER) * 6 * 10)
    fewer = dkv.reads(llm, prefill, ANSWER)
    assert fewer.index.shape[2] == 10
    np.testing.assert_array_equal(fewer.share, read.share[:, :, :10])


def test_as_json_the_arrays_come_back(llm: dkv.LoadedModel, prefill: dkv.Prefill) -> None:
    read = dkv.reads(llm, prefill, ANSWER, [dkv.SnapKV(capacity=24).select(prefill.layers)])
    sent = json.loads(json.dumps(read.to_dict()))
    shape = (sent["tokens"], len(sent["layers"]), sent["strongest"])
    index = np.frombuffer(base64.b64decode(sent["index"]), f"<u{sent['index_bytes']}")
    np.testing.assert_array_equal(index.reshape(shape), read.index)
    share = np.frombuffer(base64.b64decode(sent["share"]), np.uint8).reshape(shape)
    np.testing.assert_array_equal(share, read.share)
    kept = np.frombuffer(base64.b64decode(sent["surviving"][0]), np.uint8)
    np.testing.assert_array_equal(kept.reshape(shape[:2]), read.surviving[0])


def test_reading_leaves_the_prefill_as_it_was(llm: dkv.LoadedModel) -> None:
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    before = [keys.clone() for keys in prefill.keys]
    first = dkv.reads(llm, prefill, ANSWER)
    assert all(torch.equal(one, two) for one, two in zip(before, prefill.keys, strict=True))
    again = dkv.reads(llm, prefill, ANSWER)
    np.testing.assert_array_equal(first.share, again.share)


def test_an_answer_of_no_tokens_or_too_many_is_refused(
    llm: dkv.LoadedModel, prefill: dkv.Prefill
) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        dkv.reads(llm, prefill, [])
    with pytest.raises(ValueError, match=r"answer of 3,000 tokens does not fit"):
        dkv.reads(llm, prefill, [7] * 3000)
