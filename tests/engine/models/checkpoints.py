"""Tiny random checkpoints, written name by name as each family's are published.

Nothing here saves through transformers, so that what is read back is the format and not a mirror of
the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import Tensor

from tests.engine.tiny import CHAT_TEMPLATE, DOCUMENT, QUESTION, tiny_tokenizer, vocabulary_size

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 48, 64, 5, 6, 2, 8
PIECES = 360
"""SentencePiece's vocabulary, of which the last six are unused."""
CHATML = {PIECES - 2: "<|im_end|>", PIECES - 1: "<|im_start|>"}

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One published model: what its config.json says and what its weight files hold."""

    name: str
    config: dict[str, Any]
    weights: Callable[[Family], State]
    tokenizer: Callable[[Path], None]
    shards: int = 1
    qkv_bias: bool = False
    head_norms: bool = False
    tied: bool = False
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    def write(self, folder: Path, **changes: Any) -> Path:
        """The folder as it would be downloaded."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {**self.config, **changes})
        write_json(folder / "generation_config.json", {"bos_token_id": 1, **self.generation})
        write_weights(folder, self.weights(self), self.shards)
        self.tokenizer(folder)
        return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), "utf-8")


def write_weights(folder: Path, state: State, shards: int) -> None:
    """model.safetensors, or shards with their index; neighbours lie in different shards."""
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    places = {
        name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors"
        for index, name in enumerate(state)
    }
    for file in sorted(set(places.values())):
        part = {name: tensor for name, tensor in state.items() if places[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


class Random:
    """Weights of a size that keeps attention sharp and answers varied."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return 0.15 * torch.randn(*shape, generator=self.generator)

    def norm(self, size: int) -> Tensor:
        return 1 + self(size)


def llama_weights(family: Family) -> State:
    """What Llama, Mistral and Qwen call their weights."""
    random = Random(1)
    state = {"model.embed_tokens.weight": random(family.vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = random(heads * HEAD_DIM, HIDDEN)
            if family.qkv_bias:
                state[f"{prefix}.self_attn.{name}_proj.bias"] = random(heads * HEAD_DIM)
        if family.head_norms:
            state[f"{prefix}.self_attn.q_norm.weight"] = random.norm(HEAD_DIM)
            state[f"{prefix}.self_attn.k_norm.weight"] = random.norm(HEAD_DIM)
        state[f"{prefix}.self_attn.o_proj.weight"] = random(HIDDEN, HEADS * HEAD_DIM)
        state[f"{prefix}.mlp.gate_proj.weight"] = random(INTERMEDIATE, HIDDEN)
        state[f"{prefix}.mlp.up_proj.weight"] = random(INTERMEDIATE, HIDDEN)
        state[f"{prefix}.mlp.down_proj.weight"] = random(HIDDEN, INTERMEDIATE)
        state[f"{prefix}.input_layernorm.weight"] = random.norm(HIDDEN)
        state[f"{prefix}.post_attention_layernorm.weight"] = random.norm(HIDDEN)
    state["model.norm.weight"] = random.norm(HIDDEN)
    if not family.tied:
        state["lm_head.weight"] = random(family.vocabulary, HIDDEN)
    return state


def internlm2_weights(family: Family) -> State:
    """InternLM2's names; wqkv is fused."""
    random = Random(2)
    fused = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    state = {"model.tok_embeddings.weight": random(family.vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        state[f"{prefix}.attention.wqkv.weight"] = random(fused, HIDDEN)
        state[f"{prefix}.attention.wo.weight"] = random(HIDDEN, HEADS * HEAD_DIM)
        if family.config["bias"]:
            state[f"{prefix}.attention.wqkv.bias"] = random(fused)
            state[f"{prefix}.attention.wo.bias"] = random(HIDDEN)
        state[f"{prefix}.feed_forward.w1.weight"] = random(INTERMEDIATE, HIDDEN)
        state[f"{prefix}.feed_forward.w3.weight"] = random(INTERMEDIATE, HIDDEN)
        state[f"{prefix}.feed_forward.w2.weight"] = random(HIDDEN, INTERMEDIATE)
        state[f"{prefix}.attention_norm.weight"] = random.norm(HIDDEN)
        state[f"{prefix}.ffn_norm.weight"] = random.norm(HIDDEN)
    state["model.norm.weight"] = random.norm(HIDDEN)
    state["output.weight"] = random(family.vocabulary, HIDDEN)
    return state


def byte_level_tokenizer(tokenizer_class: str) -> Callable[[Path], None]:
    """tokenizer.json as Llama 3 and Qwen have it, with the class that their config names."""

    def write(folder: Path) -> None:
        tiny_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": tokenizer_class,
            "chat_template": CHAT_TEMPLATE,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", settings)

    return write


def sentencepiece_tokenizer(settings: dict[str, Any], dummy_prefix: bool) -> Callable[[Path], None]:
    """tokenizer.model alone, trained on the tests' own text."""

    def write(folder: Path) -> None:
        train_sentencepiece(folder, dummy_prefix)
        write_json(folder / "tokenizer_config.json", settings)

    return write


def train_sentencepiece(folder: Path, dummy_prefix: bool, kind: str = "bpe") -> Path:
    """tokenizer.model of PIECES pieces, the last ones unused as InternLM2's are."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([DOCUMENT, QUESTION, "user\nassistant\n"] * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=PIECES - 6,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    path = folder / "tokenizer.model"
    proto = ModelProto.FromString(path.read_bytes())
    while len(proto.pieces) < PIECES:
        count = len(proto.pieces)
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{count}]", score=-float(count))
    path.write_bytes(proto.SerializeToString())
    return path


def special(text: str) -> dict[str, Any]:
    """An entry of tokenizer_config.json's added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags, "special": True}


INTERNLM2_TOKENIZER = {
    "added_tokens_decoder": {
        str(index): special(text)
        for index, text in {0: "<unk>", 1: "<s>", 2: "</s>", **CHATML}.items()
    },
    "additional_special_tokens": list(CHATML.values()),
    "auto_map": {
        "AutoTokenizer": [
            "tokenization_internlm2.InternLM2Tokenizer",
            "tokenization_internlm2_fast.InternLM2TokenizerFast",
        ]
    },
    "bos_token": "<s>",
    "chat_template": "{{ bos_token }}" + CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "decode_with_prefix_space": False,
    "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "</s>",
    "sp_model_kwargs": None,
    "tokenizer_class": "InternLM2Tokenizer",
    "unk_token": "<unk>",
}
MISTRAL_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {
        str(index): special(text) for index, text in enumerate(("<unk>", "<s>", "</s>"))
    },
    "bos_token": "<s>",
    "chat_template": "{{ bos_token }}{% for message in messages %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
SIZES = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "use_cache": True,
}
LLAMA = {
    **SIZES,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "vocab_size": vocabulary_size(),
}
LLAMA31 = {
    **LLAMA,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
}
MISTRAL = {
    **SIZES,
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "vocab_size": PIECES,
}
QWEN2 = {
    **SIZES,
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_sliding_window": False,
    "vocab_size": vocabulary_size(),
}
QWEN3 = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.51.0",
}
INTERNLM2 = {
    **SIZES,
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 1024,
    "model_type": "internlm2",
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.5, "type": "dynamic"},
    "rope_theta": 50000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0",
    "vocab_size": PIECES,
}
LLAMA3_TOKENIZER = byte_level_tokenizer("PreTrainedTokenizerFast")
QWEN_TOKENIZER = byte_level_tokenizer("Qwen2Tokenizer")
MISTRAL_PIECES = sentencepiece_tokenizer(MISTRAL_TOKENIZER, dummy_prefix=True)
INTERNLM2_PIECES = sentencepiece_tokenizer(INTERNLM2_TOKENIZER, dummy_prefix=False)

FAMILIES = [
    Family(name="llama-3", config=LLAMA, weights=llama_weights, tokenizer=LLAMA3_TOKENIZER),
    Family(
        name="llama-3.1",
        config=LLAMA31,
        weights=llama_weights,
        tokenizer=LLAMA3_TOKENIZER,
        shards=3,
    ),
    Family(
        name="llama-3.2",
        config={**LLAMA31, "head_dim": HEAD_DIM, "tie_word_embeddings": True},
        weights=llama_weights,
        tokenizer=LLAMA3_TOKENIZER,
        tied=True,
    ),
    Family(
        name="mistral-v0.2",
        config=MISTRAL,
        weights=llama_weights,
        tokenizer=MISTRAL_PIECES,
        shards=3,
    ),
    Family(name="mistral-v0.3", config=MISTRAL, weights=llama_weights, tokenizer=MISTRAL_PIECES),
    Family(
        name="qwen2",
        config=QWEN2,
        weights=llama_weights,
        tokenizer=QWEN_TOKENIZER,
        qkv_bias=True,
        shards=2,
    ),
    Family(
        name="qwen2.5",
        config={**QWEN2, "tie_word_embeddings": True},
        weights=llama_weights,
        tokenizer=QWEN_TOKENIZER,
        qkv_bias=True,
        tied=True,
    ),
    Family(
        name="qwen3",
        config=QWEN3,
        weights=llama_weights,
        tokenizer=QWEN_TOKENIZER,
        head_norms=True,
        tied=True,
    ),
    Family(
        name="internlm2",
        config={**INTERNLM2, "bias": True, "rope_scaling": None},
        weights=internlm2_weights,
        tokenizer=INTERNLM2_PIECES,
    ),
    Family(
        name="internlm2.5",
        config=INTERNLM2,
        weights=internlm2_weights,
        tokenizer=INTERNLM2_PIECES,
        shards=3,
        generation={"eos_token_id": [2, PIECES - 2], "pad_token_id": 2},
    ),
]
