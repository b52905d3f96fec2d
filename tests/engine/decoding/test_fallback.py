"""Models that the written-out decode step does not compute decode by their own forward pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

import dynamickv as dkv
from benchmarks.coverage.tiny import NAMES, tiny_model
from dynamickv.cache import prune
from dynamickv.decoding.cuda_graph import graphable
from dynamickv.decoding.decode import feeder
from dynamickv.fast.decoder import steppable
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt
from tests.engine.tiny import tiny_tokenizer

KINDS = {
    "sliding": "gemma3_text",
    "chunked": "llama4_text",
    "linear": "qwen3_next",
    "conv": "lfm2",
    "hybrid": "falcon_h1",
    "moe": "nemotron_h",
    "shared": "gemma4_text",
    "a latent": "deepseek_v3",
    "learned sinks": "gpt_oss",
    "capped logits": "gemma2",
}
LENGTH = 40


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_no_step_is_written_out_for(name: str) -> None:
    if name not in CONFIG_MAPPING or name not in NAMES:
        pytest.skip(f"this transformers has no {name}")
    model = tiny_model(name)
    llm = dkv.LoadedModel.wrap(model, tiny_tokenizer(), name, "test")
    ids = list(range(3, 3 + LENGTH))
    prompt = EncodedPrompt(
        token_ids=ids,
        text="a" * LENGTH,
        offsets=[(place, place + 1) for place in range(LENGTH)],
        document_span=(0, LENGTH),
        document_characters=(0, LENGTH),
        question_span=(LENGTH, LENGTH),
        question="",
        original_length=LENGTH,
    )
    read = prefill_prompt(llm, prompt)
    cache = prune(read, dkv.SnapKV(capacity=24).select(read.layers), room=4)
    assert not steppable(llm)
    assert not graphable(llm)
    feed = feeder(llm, cache.plain)
    assert isinstance(feed, partial)
    whole = prune(read, dkv.FullKV().select(read.layers), room=4)
    logits = feed([whole], [7], [LENGTH])[0]
    own = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([ids]), past_key_values=own)
        expected = model(torch.tensor([[7]]), past_key_values=own).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
