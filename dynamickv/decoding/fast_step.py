"""A step on a CPU in precision "fast" of a decoder whose weights are all codes: compiled from the
first layer to the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamickv.decoding.cpu_ops import show
from dynamickv.fast import attention, few_rows, step
from dynamickv.fast.attention import place_of
from dynamickv.fast.decoder import Rotation, linears_of
from dynamickv.fast.packed import PackedWeights
from dynamickv.fast.team import runtime
from dynamickv.layers.kv import KVLayer
from dynamickv.models import LoadedModel


class FastStep:
    """Hidden states of a few rows through all layers."""

    def __init__(self, llm: LoadedModel, packed: PackedWeights) -> None:
        """
        Args:
            packed: of a model that `takes` allows.
        """
        model: Any = llm.model
        self._heads = llm.geometry.num_query_heads, llm.geometry.head_dim
        self._eps: float = model.model.norm.variance_epsilon
        first = model.model.layers[0]
        self._scaling: float = first.self_attn.scaling
        self._inner: int = first.mlp.down_proj.in_features
        # What the addresses belong to stays for as long as they are used.
        self._kept: list[Any] = []
        self._layers = np.array([self._addresses(one, packed) for one in model.model.layers])
        attn = first.self_attn
        self._width = sum(one.out_features for one in (attn.q_proj, attn.k_proj, attn.v_proj))

    @staticmethod
    def takes(llm: LoadedModel, packed: PackedWeights) -> bool:
        """Whether every layer's weights are codes, and all layers alike in shapes and numbers."""
        model: Any = llm.model
        *layers, _ = linears_of(llm)
        coded = all(packed.of(*linears).narrow is not None for linears in layers)
        kinds = {_kind(layer) for layer in model.model.layers}
        epsilons = {model.model.norm.variance_epsilon}.union(*(kind[0] for kind in kinds))
        return coded and len(kinds) == 1 and len(epsilons) == 1

    def __call__(
        self, x: Tensor, rotation: Rotation, stores: Sequence[Sequence[KVLayer]]
    ) -> Tensor:
        """Hidden states, (rows, size), after the last layer; every layer is shown its queries."""
        seen = any(layer.after_attention is not None for store in stores for layer in store)
        asked = torch.empty(len(stores) if seen else 1, len(x), *self._heads)
        held = [[_slot(layer) for layer in store] for store in stores]
        cos, sin = (turn[:, 0].contiguous().numpy() for turn in rotation)
        x = x.contiguous()
        places, (start, threads) = np.array(held, np.int64), runtime()
        query_heads, dim = self._heads
        sizes = *x.shape, self._width, query_heads * dim, self._inner
        room = np.empty(step.room_for(*sizes), np.float32)
        attending = np.empty(attention.room_for(places, query_heads, dim, threads), np.int64)
        works = np.array([few_rows.WORK, attention.WORK, start, threads], np.int64)
        step.through(
            self._layers, places, x.numpy(), cos, sin, asked.numpy(), room, attending,
            self._width, self._inner, self._eps, np.float32(self._scaling), works,
        )  # fmt: skip
        if seen:
            for store, queries in zip(stores, asked, strict=True):
                for row, layer in enumerate(store):
                    show(layer, queries[row], self._scaling)
        return x

    def _addresses(self, layer: Any, packed: PackedWeights) -> list[int]:
        """A row of `step.through`'s layers."""
        attn, mlp = layer.self_attn, layer.mlp
        norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
        return [
            self._address(layer.input_layernorm.weight),
            *self._product(packed, attn.q_proj, attn.k_proj, attn.v_proj),
            *(0 if norm is None else self._address(norm.weight) for norm in norms),
            *self._product(packed, attn.o_proj),
            self._address(layer.post_attention_layernorm.weight),
            *self._product(packed, mlp.gate_proj, mlp.up_proj)[:2],
            *self._product(packed, mlp.down_proj)[:2],
        ]

    def _product(self, packed: PackedWeights, *linears: nn.Linear) -> list[int]:
        """Addresses and bits of projections of one input."""
        weight = packed.of(*linears)
        assert weight.narrow is not None
        self._kept.append(weight.narrow)
        bias = 0 if weight.bias is None else self._address(weight.bias)
        return [weight.narrow.data.data_ptr(), weight.narrow.bits, bias]

    def _address(self, weight: Tensor) -> int:
        weight = weight.detach().contiguous()
        self._kept.append(weight)
        return weight.data_ptr()


def _kind(layer: Any) -> tuple[frozenset[float], tuple[Any, ...]]:
    """The epsilons of a layer's norms, and its factor and shapes."""
    attn, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attn, name) for name in ("q_norm", "k_norm") if hasattr(attn, name)]
    linears = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.down_proj
    shapes = tuple((one.in_features, one.out_features) for one in linears)
    return frozenset(norm.variance_epsilon for norm in norms), (attn.scaling, len(norms), shapes)


def _slot(layer: KVLayer) -> tuple[int, ...]:
    """Where the token's key and value go."""
    slot = layer.advance(1)
    return place_of(*layer.buffers, slot + 1)
