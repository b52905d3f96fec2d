"""Tiny random models, a tokenizer trained on the spot, and every method in a small size."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dynamickv as dkv

DOCUMENT = (
    "The harbour was built in 1911. Ms Okafor keeps the light, and Mr Lind keeps the books. "
    "In the spring of 1947 the pier was painted green; nobody remembers why. "
) * 4
QUESTION = "Who keeps the light?"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]

NUM_LAYERS = 6
"""No multiple of DynamicKV's default update interval, and more than one update."""
GEOMETRY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    # Wide weights, so that attention is sharp and greedy answers do not repeat one token.
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    # Layers 2 and 5 attend to the whole prompt, the others to a window.
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"sliding_window": 32, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
    ),
}


def tiny_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, ChatML template. Characters that it never saw, such
    as emoji, take one token per byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=settings.pop("trim_offsets", True))
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([DOCUMENT, QUESTION, "user\nassistant\n"], trainer)
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@lru_cache
def vocabulary_size() -> int:
    return len(tiny_tokenizer())


def tiny_model(
    family: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Random weights, grouped queries (6 query heads, 2 KV heads): built from config, never
    downloaded."""
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        **{
            **GEOMETRY,
            "vocab_size": vocabulary_size(),
            "eos_token_id": None,
            **extra,
            **changes,
        }
    )
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model.eval()


def tiny_llm(family: str = "llama", attention: str = "sdpa", **changes: Any) -> dkv.LoadedModel:
    """A tiny model with its tokenizer, ready to compare."""
    return dkv.LoadedModel.wrap(
        tiny_model(family, attention, **changes), tiny_tokenizer(), "tiny", "test"
    )


def small_instances(capacity: int = 24, **settings: Any) -> list[dkv.CompressionMethod]:
    """Every registered method that a capacity is enough for, so that methods added later are
    tested too."""
    instances = []
    for name, kind in dkv.METHODS.items():
        needed = {
            field.name
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if needed <= {"capacity", *settings}:
            instances.append(dkv.build_method(name, capacity=capacity, **settings))
    return instances


SMALL_INSTANCES = small_instances()
COMPRESSING = [method for method in SMALL_INSTANCES if method.name != "FullKV"]


def method_name(method: dkv.CompressionMethod) -> str:
    return method.name


def random_layers(
    seed: int,
    num_layers: int = NUM_LAYERS,
    query_heads: int = 6,
    kv_heads: int = 2,
    length: int = 60,
    head_dim: int = 8,
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys per layer for `dynamickv.retain`; layers differ in sharpness, so that
    budgets differ."""
    generator = torch.Generator().manual_seed(seed)
    queries = [
        torch.randn(1, query_heads, length, head_dim, generator=generator)
        * (0.5 + 2.5 * torch.rand(1, generator=generator))
        for _ in range(num_layers)
    ]
    keys = [
        torch.randn(1, kv_heads, length, head_dim, generator=generator) for _ in range(num_layers)
    ]
    return queries, keys


def retain(
    method: dkv.CompressionMethod, queries: list[Tensor], keys: list[Tensor]
) -> dkv.Retention:
    """`dynamickv.retain` with values, for methods that read them; any of the keys' shape will
    do."""
    return dkv.retain(method, queries, keys, [key.flip(-1) for key in keys])


def heads_of(kept: Any) -> list[list[int]]:
    """A layer's positions per head, whether heads hold equally many or not."""
    return [head.tolist() for head in kept]


def tiny_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: words begin with a mark, unknown characters become bytes."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!\n"
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁", "w"), ("a", "s")]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]",
    )
