"""Tiny models in GGUF files, written with the gguf library alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from tests.engine.tiny import CHAT_TEMPLATE, tiny_tokenizer

HIDDEN, HEADS, KV_HEADS, LAYERS, FEED_FORWARD = 48, 6, 2, 2, 64


def write_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of random float32 weights, and the tiny tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    vocabulary = add_tokenizer(writer)
    rng = np.random.default_rng(seed)
    for name, shape in _shapes(vocabulary).items():
        weights = rng.normal(0.0, 0.15, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    _finish(writer)
    return path


def write_model(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    tensors_per_part: int = 0,
    **tokenizer: Any,
) -> Path:
    """A model as llama.cpp's converter writes it, in float32.

    Args:
        settings: metadata of the architecture besides the usual, or instead; None leaves one out.
        tensors: more of them, by their names.
        without: tensors to leave out.
        tensors_per_part: write NAME-00001-of-0000N.gguf and so on; the first one is returned.
    """
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    usual = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters.get("rope_theta"),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    writer = gguf.GGUFWriter(
        path, architecture, split_max_tensors=tensors_per_part, small_first_shard=False
    )
    for key, value in {**usual, **(settings or {})}.items():
        if value is not None:
            add(writer, f"{architecture}.{key}", value)
    add_tokenizer(writer, **tokenizer)
    for name, weights in {**_tensors(model, architecture), **(tensors or {})}.items():
        if name not in without:
            writer.add_tensor(name, np.ascontiguousarray(weights, dtype=np.float32))
    _finish(writer)
    parts = sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))
    return parts[0] if tensors_per_part else path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A metadata entry of the type that llama.cpp would use."""
    {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }[type(value)](key, value)


def add_tokenizer(
    writer: gguf.GGUFWriter,
    pre: str | None = "gpt-2",
    backend: Tokenizer | None = None,
    types: Mapping[str, gguf.TokenType] | None = None,
    **more: Any,
) -> int:
    """A byte-level BPE, by default the tiny one; returns the size of its vocabulary.

    Args:
        types: of tokens that are neither markup nor normal.
        more: entries under tokenizer.ggml, instead of the tiny tokenizer's or besides.
    """
    tokenizer = json.loads((backend or tiny_tokenizer().backend_tokenizer).to_str())
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types(
        [
            (types or {}).get(
                token, gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
            )
            for token, number in tokens
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    ids = {"bos": 0, "eos": 1, "unknown": 2, "padding": 2}
    for key, value in {**{f"{name}_token_id": id for name, id in ids.items()}, **more}.items():
        add(writer, f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config = model.config
    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for ours, weight in model.state_dict().items():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, ending = ours.rsplit(".", 1)
        array = weight.float().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = (
                config.num_attention_heads
                if stem.endswith("q_proj")
                else config.num_key_value_heads
            )
            # llama.cpp rotates neighbours, transformers the halves.
            split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        if architecture == "gemma3" and stem.endswith("norm"):
            array = array + 1
        tensors[f"{names.get_name(stem)}.{ending}"] = array
    return tensors


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    narrow = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocabulary, HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (narrow, HIDDEN),
            f"blk.{layer}.attn_v": (narrow, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_up": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FEED_FORWARD),
        }
    return shapes
