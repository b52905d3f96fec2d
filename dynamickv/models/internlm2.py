"""InternLM2 and InternLM2.5 without their remote code: the same computation as Llama, stored
otherwise.

Importing this module tells transformers how to read "internlm2" checkpoints into its own Llama:
names, and `wqkv`, which holds per KV head its query heads, then its key, then its value. The
tokenizer is built from tokenizer.model as the published fast tokenizer does
(huggingface.co/internlm/internlm2_5-7b-chat-1m, tokenization_internlm2_fast.py).
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils.hub import cached_file

MODEL_TYPE = "internlm2"
NAMES = {
    "tok_embeddings": "embed_tokens",
    r"^output\.": "lm_head.",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
FUSED = "attention.wqkv"
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


class InternLM2Config(LlamaConfig):  # type: ignore[no-untyped-call]
    """LlamaConfig, with InternLM2's `bias` for the attention's projections."""

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = bool(kwargs.pop("bias", self.attention_bias))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class InternLM2ForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Llama under the name that its checkpoints carry."""

    config_class = InternLM2Config

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint of transformers' own Llama, which needs nothing of this module.

        Takes what transformers' `save_pretrained` takes.
        """
        settings = {**self.config.to_dict(), "architectures": [LlamaForCausalLM.__name__]}
        for theirs in ("model_type", "auto_map"):
            settings.pop(theirs, None)
        with torch.device("meta"):
            llama = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        llama.load_state_dict(self.state_dict(), assign=True)
        llama.generation_config = self.generation_config
        llama.save_pretrained(save_directory, *args, **kwargs)


class SplitGroups(ConversionOps):
    """`wqkv`, (kv_heads x (query heads per KV head + 2) x head_dim, ...), to query, key, value."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Weights and biases alike: only the first dimension is taken apart."""
        (found,) = input_dict.values()
        fused: Tensor = found[0] if isinstance(found, list) else found
        config = kwargs["config"]
        per_group = config.num_attention_heads // config.num_key_value_heads + 2
        groups = fused.view(
            config.num_key_value_heads, per_group, config.head_dim, *fused.shape[1:]
        )
        parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
        return {
            target: part.flatten(0, 2).clone()
            for target, part in zip(target_patterns, parts, strict=True)
        }


def load_tokenizer(
    source: str | os.PathLike[str], revision: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id, from tokenizer.json or else from tokenizer.model.

    Raises:
        OSError: if there is neither.
        ValueError: if tokenizer.model is not a SentencePiece BPE model.
    """
    file = partial(_file, source, revision)
    if file("tokenizer.json", required=False):
        ready: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            source, revision=revision or "main"
        )
        return ready
    settings = _json(file("tokenizer_config.json", required=False))
    added = {
        int(index): AddedToken(**token) if isinstance(token, dict) else AddedToken(token)
        for index, token in settings.get("added_tokens_decoder", {}).items()
    }
    template = file("chat_template.jinja", required=False)
    names = {
        kind: _content(settings.get(kind) or default)
        for kind, default in (
            ("unk_token", "<unk>"),
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("pad_token", "</s>"),
        )
    }
    tokenizer = _tokenizer(str(file("tokenizer.model")), added, names["unk_token"])
    before = [names["bos_token"]] if settings.get("add_bos_token", True) else []
    after = [names["eos_token"]] if settings.get("add_eos_token", False) else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in before + after],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=_text(template) if template else settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _tokenizer(path: str, added: dict[int, AddedToken], unknown: str) -> Tokenizer:
    """SentencePiece's BPE as a fast tokenizer; added tokens take the place of unused pieces."""
    try:
        extractor: Any = SentencePieceExtractor(path)
        pieces = [piece.piece for piece in extractor.proto.pieces]
        merges = extractor.extract(BPE)["merges"]
    except (ImportError, OSError):
        raise
    except Exception as error:  # protobuf's own kind, whatever else a damaged file causes
        raise ValueError("tokenizer.model is not a SentencePiece model") from error
    if extractor.proto.trainer_spec.model_type != 2:
        raise ValueError("tokenizer.model is not a BPE model")
    for index, token in added.items():
        if index < len(pieces):
            pieces[index] = token.content
    known = set(pieces)
    tokenizer = Tokenizer(
        BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [merge for merge in merges if known.issuperset((*merge, "".join(merge)))],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([token for _, token in sorted(added.items())])
    prefix = [normalizers.Prepend("▁")] if extractor.proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    return tokenizer


def _file(
    source: str | os.PathLike[str], revision: str | None, name: str, required: bool = True
) -> str | None:
    found: str | None = cached_file(
        os.fspath(source),
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=required,
        _raise_exceptions_for_connection_errors=required,
    )
    return found


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _json(path: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(_text(path)) if path else {}
    return settings


def _content(token: Any) -> str:
    """A token is written as its text or as a dictionary around it."""
    return str(token["content"] if isinstance(token, dict) else token)


AutoConfig.register(MODEL_TYPE, InternLM2Config, exist_ok=True)
AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)
register_checkpoint_conversion_mapping(
    MODEL_TYPE,
    [
        *(WeightRenaming(theirs, ours) for theirs, ours in NAMES.items()),
        WeightConverter(FUSED, list(PROJECTIONS), [SplitGroups()]),
    ],
    overwrite=True,
)
