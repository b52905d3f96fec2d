"""A decoder of the Llama kind as a fixed sequence of operations, from embedded tokens to logits.

A model's own forward pass does much besides: it cannot be captured as a CUDA graph, and on a CPU it
multiplies matrices in a layout that suits prompts. Takes the model classes in FAMILIES (see
`steppable`), from the model's own weights; every other model runs its own forward pass. What is
computed how, for one token or for a whole prompt, is the `Ops`' own. Knows no graphs, no prompts
and no caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from dynamickv.models import LoadedModel

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Model classes that `DecodeStep` computes."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that do not look at the sequence's length."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the token's position, (head_dim,) each; (rows, 1, head_dim) for rows."""
HeadNorms = tuple[Tensor, Tensor, float]
"""Weights that normalise every query and every key, (head_dim,) each, and their epsilon."""
Store = TypeVar("Store")
"""What holds one layer's keys and values."""


class Ops(ABC, Generic[Store]):
    """What a step is made of, rounded where transformers' models round. Hidden states are one
    token's vector, (size,), or one row for each of several caches, (rows, size)."""

    @abstractmethod
    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""

    @abstractmethod
    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Store,
        query_heads: int,
    ) -> Tensor:
        """Normalise and rotate queries and keys; write key and value where they are held.

        Where more heads are held than the model has KV heads, each is written repeatedly.

        Returns:
            the queries, (..., query_heads, head_dim).
        """

    @abstractmethod
    def attend(self, query: Tensor, store: Store, scaling: float) -> Tensor:
        """Attention over what is held, the token itself included, (..., query_heads * head_dim)."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Up to three projections of one input, concatenated, added to a residual."""
        joined = torch.cat([self.linear(x, linear) for linear in linears], dim=-1)
        return joined if residual is None else residual + joined

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """silu(gate(x)) * up(x), of projections without bias."""
        return F.silu(self.linear(x, gate)) * self.linear(x, up)

    def speak(self, x: Tensor, norm: Any, head: nn.Linear) -> Tensor:
        """Logits of the tokens asked for, from all of the last layer's hidden states."""
        return self.project(_norm(self, x, norm), head)

    def split(
        self, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, query_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values, (..., heads, head_dim) each."""
        heads = qkv.view(*qkv.shape[:-1], -1, rotation[0].shape[-1])
        kv_heads = (heads.shape[-2] - query_heads) // 2
        turning, value = torch.split(heads, [query_heads + kv_heads, kv_heads], dim=-2)
        if norms is not None:
            query, key = torch.split(turning, [query_heads, kv_heads], dim=-2)
            query = self.norm(query, norms[0], norms[2])
            key = self.norm(key, norms[1], norms[2])
            turning = torch.cat([query, key], dim=-2)
        query, key = torch.split(_rotate(turning, rotation), [query_heads, kv_heads], dim=-2)
        return query, key, value


def _rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding, (..., heads, head_dim)."""
    cos, sin = rotation
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states * cos + turned * sin


def next_logits(
    llm: LoadedModel, ops: Ops[Store], x: Tensor, rotation: Rotation, stores: Sequence[Store]
) -> Tensor:
    """From embedded tokens, (..., size), through every layer to logits, (..., vocabulary)."""
    model: Any = llm.model
    x = through(llm, ops, x, rotation, model.model.layers, stores)
    return ops.speak(x, model.model.norm, model.lm_head)


def through(
    llm: LoadedModel,
    ops: Ops[Store],
    x: Tensor,
    rotation: Rotation,
    layers: Sequence[Any],
    stores: Sequence[Store],
) -> Tensor:
    """Hidden states, (..., size), through consecutive layers."""
    query_heads = llm.geometry.num_query_heads
    for layer, store in zip(layers, stores, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        normal = _norm(ops, x, layer.input_layernorm)
        qkv = ops.project(normal, attention.q_proj, attention.k_proj, attention.v_proj)
        query = ops.place(qkv, rotation, _head_norms(attention), store, query_heads)
        context = ops.attend(query, store, attention.scaling)
        x = ops.project(context, attention.o_proj, residual=x)
        normal = _norm(ops, x, layer.post_attention_layernorm)
        x = ops.project(ops.gate(normal, mlp.gate_proj, mlp.up_proj), mlp.down_proj, residual=x)
    return x


def normed(llm: LoadedModel, ops: Ops[Store], x: Tensor) -> Tensor:
    """What the projection to logits reads of the last layer's hidden states, (..., size)."""
    model: Any = llm.model
    return _norm(ops, x, model.model.norm)


def linears_of(llm: LoadedModel) -> Iterator[tuple[nn.Linear, ...]]:
    """The projections that `next_logits` computes, those of one input together."""
    model: Any = llm.model
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield attention.q_proj, attention.k_proj, attention.v_proj
        yield (attention.o_proj,)
        yield mlp.gate_proj, mlp.up_proj
        yield (mlp.down_proj,)
    yield (model.lm_head,)


def _norm(ops: Ops[Store], x: Tensor, norm: Any) -> Tensor:
    return ops.norm(x, norm.weight, norm.variance_epsilon)


def _head_norms(attention: Any) -> HeadNorms | None:
    """Qwen3 normalises queries and keys head by head."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive parts of a decoder that lie on one device."""

    device: torch.device
    layers: range
    embeds: bool
    """Whether tokens are embedded and their positions turned into rotations here."""
    norms: bool
    """Whether the last layer's output is normalised here."""
    speaks: bool
    """Whether logits come from here."""


def stages(llm: LoadedModel) -> list[Stage]:
    """Where a decoder of the Llama kind lies, in the order of its parts: one stage for each device,
    more where devices take turns; empty where a part is split, or its weights are elsewhere while
    they are not used."""
    model: Any = llm.model
    decoder = model.model
    parts = [
        [decoder.embed_tokens, decoder.rotary_emb],
        *([layer] for layer in decoder.layers),
        [decoder.norm],
        [model.lm_head],
    ]
    places: list[torch.device] = []
    for part in parts:
        devices = {t.device for module in part for t in (*module.parameters(), *module.buffers())}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            return []
        places.append(devices.pop())
    norm = len(decoder.layers) + 1
    found: list[Stage] = []
    start = 0
    for end in range(1, len(parts) + 1):
        if end < len(parts) and places[end] == places[start]:
            continue
        layers = range(max(start - 1, 0), min(end - 1, len(decoder.layers)))
        found.append(Stage(places[start], layers, start == 0, start <= norm < end, end > norm + 1))
        start = end
    return found


def steppable(llm: LoadedModel) -> bool:
    """Whether a decoder is `written_out`, all of it on the device it works on."""
    return written_out(llm) and all(p.device == llm.device for p in llm.model.parameters())


def packed_throughout(llm: LoadedModel) -> bool:
    """Whether a prompt and its answers go through packed weights alone, operation by operation."""
    return llm.packed is not None and llm.attention == "sdpa" and steppable(llm)


def held_dtype(llm: LoadedModel) -> torch.dtype:
    """The number format in which keys and values of this model are held."""
    computed: torch.dtype = llm.model.dtype
    return torch.bfloat16 if packed_throughout(llm) else computed


def written_out(llm: LoadedModel) -> bool:
    """Whether `through` computes what this model does: a class in FAMILIES, full attention in every
    layer, rotary embeddings in ROPE_TYPES, a SiLU MLP without biases, unpacked weights."""
    model: Any = llm.model
    if type(model).__name__ not in FAMILIES:
        return False
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} or slides or config.hidden_act != "silu":
        return False
    if model.model.rotary_emb.rope_type not in ROPE_TYPES:
        return False
    linears = [module for module in model.modules() if "Linear" in type(module).__name__]
    return (
        all(type(linear) is nn.Linear for linear in linears)
        and all(layer.mlp.gate_proj.bias is None for layer in model.model.layers)
        and all(layer.mlp.down_proj.bias is None for layer in model.model.layers)
    )
