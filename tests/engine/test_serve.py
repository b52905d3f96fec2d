"""Pruning while prefilling keeps what pruning afterwards keeps, and never holds the full cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import dynamickv as dkv
from tests.engine.tiny import (
    COMPRESSING,
    DOCUMENT,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    small_instances,
    tiny_llm,
    tiny_model,
    tiny_tokenizer,
)

if not hasattr(dkv, "compress"):
    pytest.skip("serve mode is not part of this release", allow_module_level=True)

NEW_TOKENS = 12
ANSWER = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def prompt(llm: dkv.LoadedModel) -> torch.Tensor:
    return torch.tensor([dkv.prefill(llm, DOCUMENT, QUESTION).prompt.token_ids])


def generated(model: PreTrainedModel, prompt: torch.Tensor, **settings: Any) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **{**ANSWER, **settings}
        )
    answer: list[int] = output[0, prompt.shape[1] :].tolist()
    return answer


CASES = [
    *(("llama", "sdpa", method) for method in SMALL_INSTANCES),
    *(("llama", "eager", method) for method in SMALL_INSTANCES),
    *(("qwen2", "sdpa", method) for method in SMALL_INSTANCES),
    *(("llama", "sdpa", method) for method in small_instances(granularity="query_head")[1:]),
]


@pytest.mark.parametrize(
    ("family", "attention", "method"),
    CASES,
    ids=lambda case: (
        case if isinstance(case, str) else f"{case.name}-{getattr(case, 'granularity', '')}"
    ),
)
def test_serving_keeps_and_answers_what_exploring_does(
    family: str, attention: str, method: Any
) -> None:
    llm = tiny_llm(family, attention)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    explored = dkv.compare(llm, prefill=prefill, methods=[method], max_new_tokens=NEW_TOKENS)
    expected = method.select(prefill.layers)
    model = tiny_model(family, attention)
    with dkv.compress(model, method) as cache:
        answer = generated(model, torch.tensor([prefill.prompt.token_ids]), past_key_values=cache)
    ours = cache.retention()
    assert ours.budget_history == expected.budget_history
    assert all(torch.equal(a, b) for a, b in zip(ours.indices, expected.indices, strict=True))
    assert answer == explored.runs[0].token_ids


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_the_full_cache_never_exists(prompt: torch.Tensor, method: Any) -> None:
    model = tiny_model()
    with dkv.compress(model, method) as cache:
        generated(model, prompt, past_key_values=cache, max_new_tokens=1)
    per_token = 2 * 2 * 8 * 4
    layer = per_token * prompt.shape[1]
    assert cache.nbytes == per_token * sum(cache.retention().budgets)
    first_pass = min(10 * (24 - 8), prompt.shape[1]) if method.name == "DynamicKV" else 40
    assert cache.peak_bytes <= layer + (NUM_LAYERS - 1) * per_token * (first_pass + 8)
    if method.name != "DynamicKV":
        assert cache.peak_bytes < layer * NUM_LAYERS / 2


def test_each_update_of_dynamickv_frees_memory_at_once(prompt: torch.Tensor) -> None:
    model = tiny_model()
    held = []
    method = dkv.DynamicKV(capacity=24, update_interval=2, r_max=3.0)
    with dkv.compress(model, method) as cache:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: held.append([x.length for x in cache.layers]))
        generated(model, prompt, past_key_values=cache, max_new_tokens=1)
    for index in (1, 3, 5):
        assert sum(held[index]) <= 24 * NUM_LAYERS + 8 * NUM_LAYERS
    assert held[0] == [3 * 16 + 8, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("method", small_instances(capacity=5000), ids=method_name)
def test_a_prompt_that_fits_answers_like_plain_generate(prompt: torch.Tensor, method: Any) -> None:
    model = tiny_model()
    expected = generated(model, prompt)
    with dkv.compress(model, method) as cache:
        assert generated(model, prompt, past_key_values=cache) == expected
    assert cache.retention().kept_fraction == 1


def test_the_model_is_as_it_was_afterwards(prompt: torch.Tensor) -> None:
    model = tiny_model()
    before = (model.config.to_dict(), generated(model, prompt))
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        generated(model, prompt, past_key_values=cache)
    with pytest.raises(KeyError), dkv.compress(model, dkv.SnapKV(capacity=24)):
        raise KeyError
    assert (model.config.to_dict(), generated(model, prompt)) == before
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_another_cache_inside_the_block_is_left_alone(prompt: torch.Tensor) -> None:
    model = tiny_model()
    expected = generated(model, prompt)
    with dkv.compress(model, dkv.SnapKV(capacity=24)):
        assert generated(model, prompt) == expected


def test_a_cache_that_is_reset_compresses_the_next_prompt_anew(prompt: torch.Tensor) -> None:
    model = tiny_model()
    with dkv.compress(model, dkv.DynamicKV(capacity=24)) as cache:
        first = generated(model, prompt, past_key_values=cache)
        kept = cache.retention()
        cache.reset()
        assert cache.nbytes == 0
        generated(model, prompt[:, :90], past_key_values=cache)
        assert cache.retention().prompt_length == 90
        cache.reset()
        assert generated(model, prompt, past_key_values=cache) == first
    again = cache.retention()
    assert all(torch.equal(a, b) for a, b in zip(kept.indices, again.indices, strict=True))


def test_a_follow_up_question_is_kept_whole(prompt: torch.Tensor) -> None:
    model = tiny_model()
    question = torch.tensor([[40, 301, 7, 99, 12]])
    with dkv.compress(model, dkv.DynamicKV(capacity=24)) as cache, torch.inference_mode():
        model(prompt, past_key_values=cache)
        budgets = [layer.length for layer in cache.layers]
        at_once = model(question, past_key_values=cache).logits[0]
        assert [layer.length for layer in cache.layers] == [b + 5 for b in budgets]
        cache.reset()
        model(prompt, past_key_values=cache)
        singly = [model(question[:, i : i + 1], past_key_values=cache).logits[0] for i in range(5)]
    torch.testing.assert_close(at_once, torch.cat(singly), rtol=0, atol=1e-4)


def test_retention_before_any_prompt_says_what_to_do() -> None:
    with (
        dkv.compress(tiny_model(), dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="no prompt has gone through this cache yet"),
    ):
        cache.retention()


def test_a_batch_is_refused(prompt: torch.Tensor) -> None:
    model = tiny_model()
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="the batch has 2 sequences"),
    ):
        model(prompt.repeat(2, 1), past_key_values=cache)
    assert cache.nbytes == 0


def test_beam_search_is_refused(prompt: torch.Tensor) -> None:
    model = tiny_model()
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="without beam search"),
    ):
        generated(model, prompt, past_key_values=cache, num_beams=2)


def test_padding_is_refused(prompt: torch.Tensor) -> None:
    model = tiny_model()
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="padding"),
    ):
        model(prompt, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("method", [None, "SnapKV", dkv.SnapKV, 24])
def test_what_is_no_method_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match="is not a method"), dkv.compress(tiny_model(), method):
        pass


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with (
        pytest.raises(ValueError, match="is an encoder-decoder; choose a decoder-only"),
        dkv.compress(model, dkv.SnapKV(capacity=24)),
    ):
        pass


def test_sliding_window_layers_are_refused() -> None:
    model = tiny_model("mistral", sliding_window=16)
    with (
        pytest.raises(ValueError, match="sliding_attention"),
        dkv.compress(model, dkv.SnapKV(capacity=24)),
    ):
        pass


def test_the_answer_decodes_to_text(prompt: torch.Tensor) -> None:
    model = tiny_model()
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        answer = generated(model, prompt, past_key_values=cache)
    assert isinstance(tiny_tokenizer().decode(answer), str)
    assert len(answer) <= NEW_TOKENS
