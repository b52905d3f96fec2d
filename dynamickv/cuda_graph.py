"""The decode step as one CUDA graph: what a pruned cache makes possible.

A pruned cache's buffers have a fixed, preallocated size, so one token's whole way through the model
is the same sequence of launches on the same memory every time; only numbers on the device change
(the token, its position, the slot it fills in each layer). The sequence is captured once and
replayed per token, which frees it from the host. Layers may differ in length: each is fixed.

The step is written out here for decoders of the Llama kind, from the model's own weights, with
Triton kernels where they run and plain torch operations elsewhere. Other models decode without a
graph.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamickv.cache import KVCache
from dynamickv.models import LoadedModel

log = logging.getLogger(__name__)

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Model classes that `DecodeStep` computes."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that do not look at the sequence's length."""
LEAST_STEPS = 16
"""Fewer steps than this are not worth a capture."""


class Ops(Protocol):
    """What a decode step is made of; vectors of one token, without a batch dimension."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of a vector."""

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Up to three projections of one vector, concatenated, added to a residual."""

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """silu(gate(x)) * up(x)."""

    def place(
        self,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor, float] | None,
        keys: Tensor,
        values: Tensor,
        slot: Tensor,
        query_heads: int,
    ) -> Tensor:
        """Rotate queries and keys; write key and value into their slot; (query_heads, head_dim)."""

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, slot: Tensor, scaling: float
    ) -> Tensor:
        """Attention of one token over the slots up to its own, (query_heads * head_dim,)."""


class PlainOps:
    """Torch operations, on any device."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension, rounded as transformers' models round it."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Up to three projections of one vector, concatenated, added to a residual."""
        outputs = [F.linear(x, linear.weight, linear.bias) for linear in linears]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined if residual is None else residual + joined

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """silu(gate(x)) * up(x)."""
        return F.silu(F.linear(x, gate.weight)) * F.linear(x, up.weight)

    def place(
        self,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor, float] | None,
        keys: Tensor,
        values: Tensor,
        slot: Tensor,
        query_heads: int,
    ) -> Tensor:
        """Rotate queries and keys; write key and value into their slot; (query_heads, head_dim)."""
        stored, _, dim = keys.shape
        heads = qkv.view(-1, dim)
        kv_heads = (heads.shape[0] - query_heads) // 2
        query, key, value = torch.split(heads, [query_heads, kv_heads, kv_heads])
        if norms is not None:
            query = self.norm(query, norms[0], norms[2])
            key = self.norm(key, norms[1], norms[2])
        repeat = stored // kv_heads
        for buffer, new in ((keys, _rotate(key, rotation)), (values, value)):
            buffer.index_copy_(1, slot, new.repeat_interleave(repeat, dim=0).unsqueeze(1))
        return _rotate(query, rotation)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, slot: Tensor, scaling: float
    ) -> Tensor:
        """Attention of one token over the slots up to its own, (query_heads * head_dim,)."""
        heads, room, dim = keys.shape
        visible = torch.arange(room, device=keys.device) <= slot
        output = F.scaled_dot_product_attention(
            query.view(1, heads, -1, dim),
            keys[None],
            values[None],
            attn_mask=visible[None, None, None],
            scale=scaling,
        )
        return output.reshape(-1)


def _rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
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
        self, llm: LoadedModel, cache: KVCache, position: int, room: int, ops: Ops
    ) -> None:
        self._model: Any = llm.model
        self._ops = ops
        self._query_heads = llm.geometry.num_query_heads
        self._buffers = [
            tuple(buffer[0] for buffer in layer.reserve(room)) for layer in cache.layers
        ]
        device = llm.device
        self._first_slots = torch.tensor([layer.length for layer in cache.layers], device=device)
        self._first_position = position
        self.slots = self._first_slots.clone()
        """Where the next key and value of each layer go, (layers,)."""
        self.position = torch.empty(1, 1, dtype=torch.long, device=device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.chosen = torch.empty(2, dtype=torch.float64, device=device)
        """(token id, log-probability) after a step."""
        self.rewind()

    def rewind(self) -> None:
        """Back to the first step; what was written since is overwritten by the next steps."""
        self.slots.copy_(self._first_slots)
        self.position.fill_(self._first_position)

    def __call__(self) -> Tensor:
        """Feed `token`, write `chosen`, move `position` and `slots` on; the logits."""
        decoder, ops = self._model.model, self._ops
        x = decoder.embed_tokens(self.token)[0]
        rotation = tuple(part.view(-1) for part in decoder.rotary_emb(x, self.position))
        for index, (layer, (keys, values)) in enumerate(
            zip(decoder.layers, self._buffers, strict=True)
        ):
            attention, mlp = layer.self_attn, layer.mlp
            slot = self.slots[index : index + 1]
            normal = self._norm(x, layer.input_layernorm)
            qkv = ops.project(normal, attention.q_proj, attention.k_proj, attention.v_proj)
            query = ops.place(
                qkv, rotation, _head_norms(attention), keys, values, slot, self._query_heads
            )
            context = ops.attend(query, keys, values, slot, attention.scaling)
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


def _head_norms(attention: Any) -> tuple[Tensor, Tensor, float] | None:
    """Qwen3 normalises queries and keys head by head."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon


class DecodeGraph:
    """A captured `DecodeStep` and the cache it grows."""

    @torch.inference_mode()
    def __init__(self, llm: LoadedModel, cache: KVCache, position: int, room: int) -> None:
        """Capture a step; nothing is decoded yet.

        Args:
            position: true position of the next token, whatever the cache dropped.
            room: steps to make room for.
        """
        self._cache = cache
        self._device = llm.device
        with torch.cuda.device(self._device):
            self._step = DecodeStep(llm, cache, position, room, _ops(self._device))
            # Compilation, handles and workspaces come before the capture, on a stream of its own.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
                self._step.rewind()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = self._step()

    @property
    def logits(self) -> Tensor:
        """Next-token logits of the last step, (vocabulary,); the next one overwrites them."""
        return self._logits

    @torch.inference_mode()
    def advance(self, token_id: int) -> tuple[int, float]:
        """Feed a token; the most likely next one and its natural-log probability."""
        with torch.cuda.device(self._device):
            self._step.token.fill_(token_id)
            self._graph.replay()
        for layer in self._cache.layers:
            layer.grow_in_place()
        next_id, logprob = self._step.chosen.tolist()
        return int(next_id), logprob


def graphable(llm: LoadedModel) -> bool:
    """Whether this model's decode step can be captured."""
    return llm.device.type == "cuda" and steppable(llm)


def steppable(llm: LoadedModel) -> bool:
    """Whether `DecodeStep` computes what this model does."""
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


@lru_cache
def _ops(device: torch.device) -> Ops:
    """Triton kernels where they compile, plain operations elsewhere."""
    try:
        from dynamickv.kernels import TritonOps

        ops = TritonOps()
        probe = torch.ones(64, device=device)
        ops.norm(probe, probe, 1e-6)
    except Exception as error:  # no Triton, no C compiler, an old card: it raises many kinds
        log.info("Decoding without Triton kernels (%s).", error)
        return PlainOps()
    return ops
