"""A question read behind a stored document leaves what reading both at once leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dynamickv as dkv
from tests.engine.tiny import (
    DOCUMENT,
    FAMILIES,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    tiny_llm,
)

families = pytest.mark.parametrize("family", list(FAMILIES))


def both(llm: dkv.LoadedModel, question: str = QUESTION) -> tuple[dkv.Prefill, dkv.Prefill]:
    document = dkv.prefill(llm, DOCUMENT, mass=True)
    return (
        dkv.with_question(llm, document, question),
        dkv.prefill(llm, DOCUMENT, question, mass=True),
    )


def assert_close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@families
def test_what_it_leaves_is_what_reading_both_at_once_leaves(family: str) -> None:
    ours, theirs = both(tiny_llm(family))
    assert ours.prompt == theirs.prompt
    assert ours.kv_bytes == theirs.kv_bytes
    assert (ours.places, ours.held) == (theirs.places, theirs.held)
    assert_close(ours.logits, theirs.logits)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for name in ("queries", "keys", "values", "mass"):
            assert_close(getattr(mine, name), getattr(other, name))


@pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
def test_every_method_answers_and_keeps_as_after_reading_both(
    method: dkv.CompressionMethod,
) -> None:
    llm = tiny_llm()
    ours, theirs = (
        dkv.compare(llm, prefill=read, methods=[method], max_new_tokens=8).runs[0]
        for read in both(llm)
    )
    assert ours.token_ids == theirs.token_ids
    assert ours.retained == theirs.retained


def test_one_document_serves_one_question_after_another_unchanged() -> None:
    llm = tiny_llm()
    document = dkv.prefill(llm, DOCUMENT)
    before = [keys.clone() for keys in document.keys]
    first = dkv.with_question(llm, document, "Who was it?")
    dkv.with_question(llm, document, QUESTION)
    again = dkv.with_question(llm, document, "Who was it?")
    assert torch.equal(first.logits, again.logits)
    assert all(map(torch.equal, before, document.keys))
    assert not document.question_aware


def test_a_question_reads_keys_that_are_not_copied_for_every_query_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = tiny_llm()
    document = dkv.prefill(llm, DOCUMENT)
    heads: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        heads.append(key.shape[1])
        return attention(query, key, value, **settings)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    dkv.with_question(llm, document, QUESTION)
    assert heads == [llm.geometry.num_kv_heads] * NUM_LAYERS


def test_a_pass_can_be_stopped_between_layers() -> None:
    llm, done = tiny_llm(), []

    def stop_at_two(layers: int) -> None:
        done.append(layers)
        if layers == 2:
            raise KeyboardInterrupt

    document = dkv.prefill(llm, DOCUMENT)
    with pytest.raises(KeyboardInterrupt):
        dkv.with_question(llm, document, QUESTION, on_layer=stop_at_two)
    assert done == [1, 2]


def test_a_prefill_with_a_question_takes_no_other() -> None:
    llm = tiny_llm()
    with pytest.raises(ValueError, match="prefill the document alone to ask several"):
        dkv.with_question(llm, dkv.prefill(llm, DOCUMENT, QUESTION), "And then?")
