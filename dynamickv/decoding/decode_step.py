"""One token's way through a decoder of the Llama kind, as a fixed sequence of operations.

A model's own forward pass does much besides: it cannot be captured as a CUDA graph, and on a CPU it
multiplies matrices in a layout that suits prompts. Takes the model classes in FAMILIES (see
`steppable`), from the model's own weights; every other model decodes by its own forward pass. The
operations are `CpuOps` for any number of caches on a CPU; for the graph `PlainOps`, or the Triton
kernels that compute the same. Knows no graphs and no prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamickv.cache import KVCache
from dynamickv.layers.kv import KVLayer
from dynamickv.memory import free_host_memory
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


class Slots(NamedTuple):
    """One layer's buffers, (heads, room, head_dim), and the slot the token takes in them, (1,)."""

    keys: Tensor
    values: Tensor
    slot: Tensor


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

    def split(
        self, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, query_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values, (..., heads, head_dim) each."""
        heads = qkv.view(*qkv.shape[:-1], -1, rotation[0].shape[-1])
        kv_heads = (heads.shape[-2] - query_heads) // 2
        query, key, value = torch.split(heads, [query_heads, kv_heads, kv_heads], dim=-2)
        if norms is not None:
            query = self.norm(query, norms[0], norms[2])
            key = self.norm(key, norms[1], norms[2])
        return _rotate(query, rotation), _rotate(key, rotation), value


class PlainOps(Ops[Slots]):
    """Torch operations on vectors of one token, on any device, the same for every token."""

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        # As a matrix of one row: the kernel, hence the rounding, of the model's own projection.
        return F.linear(x[None], linear.weight, linear.bias)[0]

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Slots,
        query_heads: int,
    ) -> Tensor:
        """Write into the token's slot."""
        query, key, value = self.split(qkv, rotation, norms, query_heads)
        repeat = store.keys.shape[0] // key.shape[0]
        for buffer, new in ((store.keys, key), (store.values, value)):
            buffer.index_copy_(1, store.slot, new.repeat_interleave(repeat, dim=0).unsqueeze(1))
        return query

    def attend(self, query: Tensor, store: Slots, scaling: float) -> Tensor:
        """Attention over the slots up to the token's own."""
        heads, room, dim = store.keys.shape
        visible = torch.arange(room, device=query.device) <= store.slot
        output = F.scaled_dot_product_attention(
            query.view(1, heads, -1, dim),
            store.keys[None],
            store.values[None],
            attn_mask=visible[None, None, None],
            scale=scaling,
        )
        return output.reshape(-1)


class CpuOps(Ops[Sequence[KVLayer]]):
    """Torch operations in float32 on a row for each of several caches, and on a row of padding
    behind a single one, which no cache sees."""

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        # A step is bound by reading weights. As the left factor of a product with few columns, but
        # two at least, MKL reads float32 weights with all cores; for F.linear's product with few
        # rows it uses one. The next product is several times slower unless its input's rows are
        # contiguous.
        out = torch.mm(linear.weight, x.t()).t().contiguous()
        return out if linear.bias is None else out + linear.bias

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Sequence[KVLayer],
        query_heads: int,
    ) -> Tensor:
        """Append each row to its own cache."""
        query, key, value = self.split(qkv, rotation, norms, query_heads)
        keys, values = key.unsqueeze(2), value.unsqueeze(2)
        for row, layer in enumerate(store):
            layer.update(keys[row : row + 1], values[row : row + 1])
        return query

    def attend(self, query: Tensor, store: Sequence[KVLayer], scaling: float) -> Tensor:
        """Each row attends to its own cache."""
        rows, _, dim = query.shape
        output = query.new_zeros(rows, query.shape[1] * dim)
        for row, layer in enumerate(store):
            keys, values = layer.held()
            # The queries of one head's group as rows: no head is repeated.
            grouped = query[row].view(1, keys.shape[1], -1, dim)
            attended = F.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
            output[row] = attended.reshape(-1)
        return output


class PackedOps(CpuOps):
    """CpuOps that read the weights from a copy in oneDNN's own order, of which a product with a few
    rows takes about half the time of MKL's. The copy is as large as the weights, and made as they
    are needed."""

    def __init__(self) -> None:
        self._packed: dict[tuple[nn.Linear, ...], tuple[Tensor, Tensor | None]] = {}

    @staticmethod
    def available() -> bool:
        """Whether torch brings oneDNN's products, which its compiler uses and does not document."""
        known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
        return known and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        return self._product(x, linear)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Projections of one input in one product."""
        joined = self._product(x, *linears)
        return joined if residual is None else residual + joined

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """Both in one product."""
        gated, raised = self._product(x, gate, up).chunk(2, dim=-1)
        return F.silu(gated) * raised

    def _product(self, x: Tensor, *linears: nn.Linear) -> Tensor:
        if linears not in self._packed:
            weights: list[Tensor] = [linear.weight for linear in linears]
            packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
            biases: list[Tensor] = [
                weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
                for linear, weight in zip(linears, weights, strict=True)
            ]
            biased = any(linear.bias is not None for linear in linears)
            self._packed[linears] = packed, torch.cat(biases) if biased else None
        weight, bias = self._packed[linears]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out


def _rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding, (..., heads, head_dim)."""
    cos, sin = rotation
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states * cos + turned * sin


def _next_logits(
    llm: LoadedModel, ops: Ops[Store], x: Tensor, rotation: Rotation, stores: Sequence[Store]
) -> Tensor:
    """From embedded tokens, (..., size), through every layer to logits, (..., vocabulary)."""
    model: Any = llm.model
    query_heads = llm.geometry.num_query_heads
    for layer, store in zip(model.model.layers, stores, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        normal = _norm(ops, x, layer.input_layernorm)
        qkv = ops.project(normal, attention.q_proj, attention.k_proj, attention.v_proj)
        query = ops.place(qkv, rotation, _head_norms(attention), store, query_heads)
        context = ops.attend(query, store, attention.scaling)
        x = ops.project(context, attention.o_proj, residual=x)
        normal = _norm(ops, x, layer.post_attention_layernorm)
        x = ops.project(ops.gate(normal, mlp.gate_proj, mlp.up_proj), mlp.down_proj, residual=x)
    return ops.project(_norm(ops, x, model.model.norm), model.lm_head)


def _norm(ops: Ops[Store], x: Tensor, norm: Any) -> Tensor:
    return ops.norm(x, norm.weight, norm.variance_epsilon)


def _head_norms(attention: Any) -> HeadNorms | None:
    """Qwen3 normalises queries and keys head by head."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon


class RowSteps:
    """Feeds one token to each of several caches, on the CPU in float32.

    Packs the weights once so many rows were fed that it would have paid, where memory has room for
    the copy; the copy lasts as long as this does.
    """

    FEW = 3
    """Rows for which packed weights gain nothing."""
    PAYS = 48
    """Rows beyond FEW, over all steps, that gain about what packing takes."""

    def __init__(self, llm: LoadedModel) -> None:
        self._llm = llm
        self._fed = 0
        self._packed: PackedOps | None = None
        self._packable = PackedOps.available()

    @torch.inference_mode()
    def __call__(
        self, caches: Sequence[KVCache], token_ids: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """What changes is in the caches.

        Args:
            caches: `plain`, of a model that is `steppable`; each grows by its token.
            positions: true positions of the tokens.

        Returns:
            next-token logits, (caches, vocabulary).
        """
        decoder: Any = self._llm.model.model
        padding = [0] * (2 - len(caches))
        x = decoder.embed_tokens(torch.tensor([*token_ids, *padding]))
        rotation = decoder.rotary_emb(x, torch.tensor([*positions, *padding])[:, None])
        layers = list(zip(*(cache.whole_layers() for cache in caches), strict=True))
        logits = _next_logits(self._llm, self._ops(len(caches)), x, rotation, layers)
        return logits[: len(caches)].contiguous()

    def _ops(self, rows: int) -> CpuOps:
        self._fed += max(0, rows - self.FEW)
        if self._packable and self._packed is None and self._fed >= self.PAYS:
            size: int = self._llm.model.get_memory_footprint()  # type: ignore[no-untyped-call]
            self._packable = free_host_memory() > 2 * size
            self._packed = PackedOps() if self._packable else None
        return self._packed if self._packed is not None and rows >= self.FEW else CpuOps()


class DecodeStep:
    """One greedy token: token id in, next token id and its log-probability out.

    For capture: all that changes from step to step lives on the device: `token`, `position`,
    `slots`. Calling it enqueues the same work every time.
    """

    def __init__(
        self, llm: LoadedModel, cache: KVCache, position: int, room: int, ops: PlainOps
    ) -> None:
        self._llm, self._ops = llm, ops
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
        decoder: Any = self._llm.model.model
        x = decoder.embed_tokens(self.token)[0]
        cos, sin = decoder.rotary_emb(x, self.position)
        rotation = cos.view(-1), sin.view(-1)
        logits = _next_logits(self._llm, self._ops, x, rotation, self._layers)
        token_id = logits.argmax()
        wide = logits.float()
        self.chosen[0] = token_id
        self.chosen[1] = wide.index_select(0, token_id.view(1))[0] - wide.logsumexp(dim=-1)
        self.position += 1
        self.slots += 1
        return logits


def steppable(llm: LoadedModel) -> bool:
    """Whether `DecodeStep` computes what this model does: a class in FAMILIES, full attention in
    every layer, rotary embeddings in ROPE_TYPES, a SiLU MLP without biases, unpacked weights on the
    device they work on."""
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
        all(parameter.device == llm.device for parameter in model.parameters())
        and all(type(linear) is nn.Linear for linear in linears)
        and all(layer.mlp.gate_proj.bias is None for layer in model.model.layers)
        and all(layer.mlp.down_proj.bias is None for layer in model.model.layers)
    )
