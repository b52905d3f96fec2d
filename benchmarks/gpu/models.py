"""Models of published geometry with random weights, and prompts of random tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import dynamickv as dkv
from dynamickv.records import EncodedPrompt

LONGEST = 131072
EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
GEOMETRIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "Llama-3-8B": (LlamaConfig, LlamaForCausalLM, {**EIGHT_B, "vocab_size": 128256}),
    "Mistral-7B-v0.2": (
        MistralConfig,
        MistralForCausalLM,
        {**EIGHT_B, "vocab_size": 32000, "sliding_window": None},
    ),
    "Qwen2-7B": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
        },
    ),
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def build(
    name: str, device: torch.device, dtype: torch.dtype, tiny: bool = False, **changes: Any
) -> dkv.LoadedModel:
    """A model of that geometry with random weights, made on the device."""
    config_class, model_class, sizes = GEOMETRIES[name]
    named = {
        **sizes,
        **(TINY if tiny else {}),
        "max_position_embeddings": 2 * LONGEST,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config_class(**named))
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return dkv.LoadedModel.wrap(model, None, name, "random weights")  # type: ignore[arg-type]


def prompt(llm: dkv.LoadedModel, length: int, seed: int = 1) -> EncodedPrompt:
    """Random tokens; no text belongs to them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, llm.model.config.vocab_size, (length,), generator=generator).tolist()
    return EncodedPrompt(
        token_ids=ids,
        text="",
        offsets=[(0, 0)] * length,
        document_span=(0, length),
        document_characters=(0, 0),
        question_span=(length - 8, length),
        question="",
        original_length=length,
    )


def ids_of(llm: dkv.LoadedModel, encoded: EncodedPrompt) -> Tensor:
    """A prompt as the model takes it, (1, length)."""
    return torch.tensor([encoded.token_ids], device=llm.device)


def kv_bytes(llm: dkv.LoadedModel, length: int) -> int:
    """Bytes of a full cache."""
    g = llm.geometry
    return 2 * g.num_layers * g.num_kv_heads * g.head_dim * length * llm.model.dtype.itemsize


def bytes_read(llm: dkv.LoadedModel) -> int:
    """Bytes of the weights that a decode step reads: all but the embedding table."""
    embedding = llm.model.get_input_embeddings().weight
    tied = llm.model.get_output_embeddings().weight is embedding
    total = sum(p.numel() * p.element_size() for p in llm.model.parameters())
    return total - (0 if tied else embedding.numel() * embedding.element_size())


@contextlib.contextmanager
def attention_set_to(llm: dkv.LoadedModel, backend: str) -> Iterator[None]:
    """Another attention of transformers' registry for a while."""
    before = llm.attention
    llm.model.set_attn_implementation(backend)
    try:
        yield
    finally:
        llm.model.set_attn_implementation(before)
