"""Observing changes nothing: not the logits, not a stranger's model, not the full cache."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import dynamickv as dkv
from dynamickv.cache import KVCache, prune
from dynamickv.compare import compare
from dynamickv.reading.observe import backend_of, observed, without_cudnn
from tests.engine.tiny import (
    DOCUMENT,
    FAMILIES,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    tiny_llm,
    tiny_model,
    tiny_tokenizer,
)

attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def plain_outputs(family: str, attention: str, token_ids: list[int]) -> Any:
    model = tiny_model(family, attention)
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)


@attentions
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_identical_to_the_plain_models(family: str, attention: str) -> None:
    prefill = dkv.prefill(tiny_llm(family, attention), DOCUMENT, QUESTION)
    plain = plain_outputs(family, attention, prefill.prompt.token_ids)
    assert torch.equal(prefill.logits, plain.logits[0, -1])


@attentions
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_keys_and_values_are_the_plain_models_cache(family: str, attention: str) -> None:
    prefill = dkv.prefill(tiny_llm(family, attention), DOCUMENT, QUESTION)
    plain = plain_outputs(family, attention, prefill.prompt.token_ids).past_key_values
    for place, observation, values in zip(
        prefill.compressed_layers, prefill.layers, prefill.values, strict=True
    ):
        assert torch.equal(observation.keys, plain.layers[place].keys[0])
        assert torch.equal(values, plain.layers[place].values[0])
    for place, state in prefill.others.items():
        assert torch.equal(state.keys, plain.layers[place].keys)
        assert torch.equal(state.values, plain.layers[place].values)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_queries_reproduce_the_models_own_attention(family: str) -> None:
    """Softmax of recorded queries and keys equals what the plain eager model reports."""
    prefill = dkv.prefill(tiny_llm(family), DOCUMENT, QUESTION, tail=5)
    model = tiny_model(family, "eager")
    with torch.inference_mode():
        weights = model(torch.tensor([prefill.prompt.token_ids]), output_attentions=True).attentions
    whole = [weights[place] for place in prefill.compressed_layers]
    for observation, expected in zip(prefill.layers, whole, strict=True):
        keys = observation.keys.repeat_interleave(3, dim=0)
        last = observation.queries[:, -1:] @ keys.transpose(1, 2) * observation.scaling
        torch.testing.assert_close(last.softmax(-1)[:, 0], expected[0, :, -1], rtol=1e-4, atol=1e-5)
        assert observation.queries.shape[1] == 5


def test_recorded_mass_is_the_attention_of_all_queries() -> None:
    prefill = dkv.prefill(tiny_llm(), DOCUMENT, QUESTION, mass=True)
    model = tiny_model(attention="eager")
    with torch.inference_mode():
        weights = model(torch.tensor([prefill.prompt.token_ids]), output_attentions=True).attentions
    for observation, expected in zip(prefill.layers, weights, strict=True):
        assert observation.mass is not None
        torch.testing.assert_close(observation.mass, expected[0].sum(1), rtol=1e-4, atol=1e-4)


def test_a_prompt_shorter_than_the_recorded_tail_is_recorded_whole(llm: dkv.LoadedModel) -> None:
    prefill = dkv.prefill(llm, "Hi.", "Who?")
    assert prefill.prompt.length < 64
    assert prefill.layers[0].queries.shape[1] == prefill.prompt.length


@attentions
def test_observing_leaves_no_trace_on_a_strangers_model(attention: str) -> None:
    model = tiny_model(attention=attention)
    before = (copy.deepcopy(model.config.to_dict()), dict(vars(model.config)))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    token_ids = torch.tensor([list(range(5, 40))])
    with torch.inference_mode():
        logits = model(token_ids).logits
        with observed(model):
            assert backend_of(model) == attention
            model(token_ids, past_key_values=KVCache.of(model.config), use_cache=True)
        assert torch.equal(model(token_ids).logits, logits)
    assert (model.config.to_dict(), dict(vars(model.config))) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_a_strangers_model_is_restored_after_an_exception() -> None:
    model = tiny_model()
    with pytest.raises(KeyError), observed(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_an_observed_model_without_our_cache_computes_as_before(llm: dkv.LoadedModel) -> None:
    token_ids = torch.tensor([list(range(5, 40))])
    with torch.inference_mode():
        ours = llm.model(token_ids).logits
        assert torch.equal(ours, tiny_model()(token_ids).logits)


def test_transformers_own_backends_stay_registered_as_they_were() -> None:
    registered = AttentionInterface()
    before = registered["sdpa"]
    tiny_llm()
    assert AttentionInterface()["sdpa"] is before


def fingerprint(prefill: dkv.Prefill) -> list[torch.Tensor]:
    tensors = [prefill.logits, *prefill.values]
    for layer in prefill.layers:
        tensors += [layer.keys, layer.queries]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
def test_comparing_never_changes_the_full_cache(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, method: Any
) -> None:
    before = fingerprint(prefill)
    compare(llm, prefill=prefill, methods=[method], max_new_tokens=4, scores=True)
    assert all(torch.equal(a, b) for a, b in zip(before, fingerprint(prefill), strict=True))


def test_a_pruned_cache_shares_no_memory_with_the_full_one(prefill: dkv.Prefill) -> None:
    for method in SMALL_INSTANCES:
        cache = prune(prefill, method.select(prefill.layers), room=3)
        for layer, observation, value in zip(
            cache.layers, prefill.layers, prefill.values, strict=True
        ):
            for part in getattr(layer, "heads", [layer]):
                keys, values = part.held()
                keys.fill_(7.0)
                values.fill_(7.0)
            assert not (observation.keys == 7).any()
            assert not (value == 7).any()


@pytest.mark.parametrize("backend", ["flash_of_ours", "someone/flash-kernel"])
def test_a_flash_backend_is_known_to_transformers_by_its_own_name(backend: str) -> None:
    names = set()

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(module.config._attn_implementation)
        return AttentionInterface()["sdpa"](module, *args, **kwargs)

    AttentionInterface.register(backend, attention)
    AttentionMaskInterface.register(backend, AttentionMaskInterface()["sdpa"])
    model = tiny_model()
    # Selected as usual, transformers would look for that kernel.
    model.config._attn_implementation = backend
    llm = dkv.LoadedModel.wrap(model, tiny_tokenizer(), "tiny", "test")
    assert llm.attention == backend
    method = dkv.SnapKV(capacity=24)
    run, expected = (
        compare(one, DOCUMENT, QUESTION, methods=[method], max_new_tokens=4).runs[0]
        for one in (llm, tiny_llm())
    )
    llm.model(torch.tensor([[5, 6, 7]]))
    assert (run.token_ids, run.retained) == (expected.token_ids, expected.retained)
    assert names == {backend}


# Models that cannot be observed.


def test_a_model_that_is_no_decoder_is_refused() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        dkv.LoadedModel.wrap(T5ForConditionalGeneration(config), tiny_tokenizer(), "t5", "test")


def test_flex_attention_is_refused_with_a_remedy() -> None:
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    with (
        pytest.raises(
            ValueError, match='cannot be observed; load LlamaForCausalLM with attention="sdpa"'
        ),
        observed(model),
    ):
        pass


def test_attention_that_leaves_a_bound_on_the_logits_out_is_refused_with_a_remedy() -> None:
    """transformers 5.17 to 5.20 give Gemma 2 sdpa where nothing is asked for."""
    model = bounded_model()
    model.config._attn_implementation = "sdpa"
    with (
        pytest.raises(ValueError, match=r'bound of 50 that Gemma2ForCausalLM .* attention="eager"'),
        observed(model),
    ):
        pass
    model.config._attn_implementation = "eager"
    with observed(model):
        pass


def bounded_model() -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Gemma2ForCausalLM(config)


def test_a_model_without_grouped_queries_works() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=24, n_layer=3, n_head=3, n_positions=512)
    )
    llm = dkv.LoadedModel.wrap(model.eval(), tiny_tokenizer(), "gpt2", "test")
    assert llm.geometry.num_kv_heads == llm.geometry.num_query_heads == 3
    methods = [dkv.FullKV(), dkv.DynamicKV(capacity=24)]
    trace = compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=3)
    assert trace.runs[1].kept_fraction < 0.5


@pytest.mark.parametrize("enabled", [True, False])
def test_cudnn_is_left_out_inside_the_block_alone(enabled: bool) -> None:
    flags = torch.backends.cuda
    found = flags.cudnn_sdp_enabled()
    flags.enable_cudnn_sdp(enabled)
    try:
        with without_cudnn():
            assert not flags.cudnn_sdp_enabled()
            assert flags.flash_sdp_enabled()
        assert flags.cudnn_sdp_enabled() == enabled
    finally:
        flags.enable_cudnn_sdp(found)


def test_cudnn_is_kept_away_until_the_last_block_of_any_thread_ends() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    with ExitStack() as later:
        with without_cudnn():
            later.enter_context(without_cudnn())
        assert not enabled()
    assert enabled() == before
