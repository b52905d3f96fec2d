"""One token's way through a decoder of the Llama kind, as a fixed sequence of operations.

A captured CUDA graph wants the same work on the same memory for every token, which a model's own
forward pass does not do. Takes the model classes in FAMILIES (see `steppable`), from the model's
own weights; every other model decodes by its own forward pass. The operations are `PlainOps`, or
the Triton kernels that compute the same. Knows no graphs and no prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamickv.cache import KVCache
from dynamickv.models import LoadedModel

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Model classes that `DecodeStep` computes."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that do not look at the sequence's length."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the token's position, (head_dim,) each."""
HeadNorms = tuple[Tensor, Tensor, float]
"""Weights that normalise every query and every key, (head_dim,) each, and their epsilon."""


class Slots(NamedTuple):
    """One layer's buffers, (heads, room, head_dim), and the slot the token takes in them, (1,)."""

    keys: Tensor
    values: Tensor
    slot: Tensor


class PlainOps:
    """What a step is made of, in torch operations on any device: vectors of one token, without a
    batch dimension, rounded where transformers' models round them."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Up to three projections of one vector, concatenated, added to a residual."""
        joined = torch.cat([_project(x, linear) for linear in linears])
        return joined if residual is None else residual + joined

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """silu(gate(x)) * up(x), of projections without bias."""
        return F.silu(_project(x, gate)) * _project(x, up)

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        slots: Slots,
        query_heads: int,
    ) -> Tensor:
        """Normalise and rotate queries and keys; write key and value into their slot.

        Where the buffers hold more heads than the model has KV heads, each is written repeatedly.

        Returns:
            the queries, (query_heads, head_dim).
        """
        stored, _, dim = slots.keys.shape
        heads = qkv.view(-1, dim)
        kv_heads = (heads.shape[0] - query_heads) // 2
        query, key, value = torch.split(heads, [query_heads, kv_heads, kv_heads])
        if norms is not None:
            query = self.norm(query, norms[0], norms[2])
            key = self.norm(key, norms[1], norms[2])
        repeat = stored // kv_heads
        for buffer, new in ((slots.keys, _rotate(key, rotation)), (slots.values, value)):
            buffer.index_copy_(1, slots.slot, new.repeat_interleave(repeat, dim=0).unsqueeze(1))
        return _rotate(query, rotation)

    def attend(self, query: Tensor, slots: Slots, scaling: float) -> Tensor:
        """Attention over the slots up to the token's own, (query_heads * head_dim,)."""
        heads, room, dim = slots.keys.shape
        visible = torch.arange(room, device=query.device) <= slots.slot
        output = F.scaled_dot_product_attention(
            query.view(1, heads, -1, dim),
            slots.keys[None],
            slots.values[None],
            attn_mask=visible[None, None, None],
            scale=scaling,
        )
        return output.reshape(-1)


def _project(x: Tensor, linear: nn.Linear) -> Tensor:
    # As a matrix of one row: the kernel, hence the rounding, of the model's own projection.
    return F.linear(x[None], linear.weight, linear.bias)[0]


def _rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding, (heads, head_dim)."""
    cos, sin = rotation
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states * cos + turned * sin


class DecodeStep:
    """One greedy token: token id in, next token id and its log-probability out.

    All that changes from step to step lives on the device: `token`, `position`, `slots`. Calling it
    enqueues the same work every time.
    """

    def __init__(
        self, llm: LoadedModel, cache: KVCache, position: int, room: int, ops: PlainOps
    ) -> None:
        self._model: Any = llm.model
        self._ops = ops
        self._query_heads = llm.geometry.num_query_heads
        device = llm.device
        layers = cache.whole_layers()
        self._first_slots = torch.tensor([layer.length for layer in layers], device=device)
        self._first_position = position
        self.slots = self._first_slots.clone()
        """Where the next key and value of each layer go, (layers,)."""
        self.position = torch.empty(1, 1, dtype=torch.long, device=device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.chosen = torch.empty(2, dtype=torch.float64, device=device)
        """(token id, log-probability) after a step."""
        self._layers = [
            Slots(keys[0], values[0], self.slots[index : index + 1])
            for index, (keys, values) in enumerate(layer.reserve(room) for layer in layers)
        ]
        self.rewind()

    def rewind(self) -> None:
        """Back to the first step; what was written since is overwritten by the next steps."""
        self.slots.copy_(self._first_slots)
        self.position.fill_(self._first_position)

    def __call__(self) -> Tensor:
        """Feed `token`, write `chosen`, move `position` and `slots` on; the logits."""
        decoder, ops = self._model.model, self._ops
        x = decoder.embed_tokens(self.token)[0]
        cos, sin = decoder.rotary_emb(x, self.position)
        rotation = cos.view(-1), sin.view(-1)
        for layer, slots in zip(decoder.layers, self._layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            normal = self._norm(x, layer.input_layernorm)
            qkv = ops.project(normal, attention.q_proj, attention.k_proj, attention.v_proj)
            query = ops.place(qkv, rotation, _head_norms(attention), slots, self._query_heads)
            context = ops.attend(query, slots, attention.scaling)
            x = ops.project(context, attention.o_proj, residual=x)
            normal = self._norm(x, layer.post_attention_layernorm)
            x = ops.project(ops.gate(normal, mlp.gate_proj, mlp.up_proj), mlp.down_proj, residual=x)
        logits = ops.project(self._norm(x, decoder.norm), self._model.lm_head)
        token_id = logits.argmax()
        wide = logits.float()
        self.chosen[0] = token_id
        self.chosen[1] = wide.index_select(0, token_id.view(1))[0] - wide.logsumexp(dim=-1)
        self.position += 1
        self.slots += 1
        return logits

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return self._ops.norm(x, norm.weight, norm.variance_epsilon)


def _head_norms(attention: Any) -> HeadNorms | None:
    """Qwen3 normalises queries and keys head by head."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon


def steppable(llm: LoadedModel) -> bool:
    """Whether `DecodeStep` computes what this model does: a class in FAMILIES, full attention in
    every layer, rotary embeddings in ROPE_TYPES, a SiLU MLP without biases, unpacked weights on one
    device."""
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
    devices = {parameter.device for parameter in model.parameters()}
    return (
        len(devices) == 1
        and all(type(linear) is nn.Linear for linear in linears)
        and all(layer.mlp.gate_proj.bias is None for layer in model.model.layers)
        and all(layer.mlp.down_proj.bias is None for layer in model.model.layers)
    )
