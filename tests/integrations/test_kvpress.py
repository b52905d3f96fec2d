"""The kvpress press keeps what the engine keeps. Runs where kvpress is installed (make kvpress)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress pins an older transformers; run make kvpress")

from kvpress.utils import get_prerope_query_states
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import dynamickv as dkv
from dynamickv.integrations.kvpress import DynamicKVPress, ShiftKVPress

LENGTH = 300


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def post_rope_queries(model: LlamaForCausalLM, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's queries, recorded by plain hooks, without the press."""
    queries: list[torch.Tensor] = []

    def record(module, arguments, named, output):
        states = get_prerope_query_states(module, named["hidden_states"])
        queries.append(apply_rotary_pos_emb(states, states, *named["position_embeddings"])[0])

    handles = [
        layer.self_attn.register_forward_hook(record, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(prompt)
    for handle in handles:
        handle.remove()
    return queries


@pytest.mark.parametrize(
    ("press", "kind"), [(DynamicKVPress, dkv.DynamicKV), (ShiftKVPress, dkv.ShiftKV)]
)
def test_the_press_keeps_exactly_what_the_engine_keeps(model, prompt, press, kind):
    full, pressed = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(prompt, past_key_values=full)
        with press(compression_ratio=0.8)(model):
            model(prompt, past_key_values=pressed)
    keys = [layer.keys for layer in full.layers]
    method = kind(capacity=int(LENGTH * (1 - 0.8)))
    retention = dkv.retain(method, post_rope_queries(model, prompt), keys)
    for layer, kept in enumerate(retention.indices):
        rows = kept[None, :, :, None].expand(-1, -1, -1, 16)
        assert torch.equal(pressed.layers[layer].keys, keys[layer].gather(2, rows))
        assert torch.equal(pressed.layers[layer].values, full.layers[layer].values.gather(2, rows))


def test_no_compression_leaves_the_cache_alone(model, prompt):
    cache = DynamicCache()
    with torch.no_grad(), DynamicKVPress(compression_ratio=0.0)(model):
        model(prompt, past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [LENGTH] * 6


def test_generation_continues_after_the_press(model, prompt):
    with DynamicKVPress(compression_ratio=0.5)(model):
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
        )
    assert output.shape[1] > LENGTH


def test_a_batch_is_refused(model, prompt):
    with (
        pytest.raises(ValueError, match="the batch has 2 sequences"),
        DynamicKVPress(compression_ratio=0.5)(model),
    ):
        model(prompt.expand(2, -1), past_key_values=DynamicCache())


def test_a_ratio_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"below 1, got 1\.5"):
        DynamicKVPress(compression_ratio=1.5)
