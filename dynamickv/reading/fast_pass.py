"""A prompt's way through a model from packed weights: the same record, in a third of the time.

Models that `decoder` takes go through it operation by operation, others through their own forward
pass with its products replaced. Either way every layer's queries and keys are shown to its cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynamickv.cache import KVCache
from dynamickv.fast.blockwise import causal_attention
from dynamickv.fast.decoder import (
    HeadNorms,
    Rotation,
    linears_of,
    next_logits,
    packed_throughout,
)
from dynamickv.fast.many_rows import ManyRows
from dynamickv.fast.packed import FEW_ROWS, FastProducts, PackedWeights
from dynamickv.layers.kv import KVLayer
from dynamickv.reading.observe import cache_argument
from dynamickv.records import Attended

if TYPE_CHECKING:
    from dynamickv.models import LoadedModel

LAST = 2 * FEW_ROWS
"""Positions that go on from the last layer's attention: of the others only keys and values are
asked for. More than are multiplied with codes, which are packed when an answer begins."""


class PromptOps(ManyRows[KVLayer]):
    """A whole prompt's positions as rows."""

    def __init__(self, packed: PackedWeights, mass: bool) -> None:
        super().__init__(packed)
        self._mass = mass
        self.received: Tensor | None = None
        """As in `FastProducts`."""
        self.last: int | None = None
        """The last layer's number. Not the layer, which holds what reads it, and so this."""

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: KVLayer,
        query_heads: int,
    ) -> Tensor:
        """Hold the whole prompt's keys and values, in bfloat16."""
        query, keys, values = self.turned(qkv, rotation, norms, query_heads)
        store.hold(keys[None], values[None], len(qkv))
        return query

    def attend(self, query: Tensor, store: KVLayer, scaling: float) -> Tensor:
        """Causal attention, shown to the layer afterwards."""
        keys, values = store.held()
        asking = query[:, -LAST:] if store.index == self.last and not self._mass else query
        context, self.received = causal_attention(
            asking, keys[0], values[0], scaling, mass=self._mass
        )
        if store.after_attention is not None:
            attended = Attended(queries=query[None], keys=keys, values=values, scaling=scaling)
            store.after_attention(store, attended)
        return (context[-LAST:] if store.index == self.last else context).flatten(1)

    def speak(self, x: Tensor, norm: Any, head: nn.Linear) -> Tensor:
        """Only the last position's next token is asked for."""
        return self.logits(x[-1:], norm, head)


class FastReading:
    """Reads a prompt into an empty cache, once what it multiplies with is packed."""

    def __init__(self, llm: LoadedModel, packed: PackedWeights, mass: bool) -> None:
        self._llm = llm
        whole = packed_throughout(llm)
        if whole:
            packed.prepare(linears_of(llm), few=False)
        self._by: PromptOps | FastProducts = (PromptOps if whole else FastProducts)(packed, mass)

    def take_received(self) -> Tensor | None:
        """What the positions received in the layer computed last, (num_query_heads, prompt length)
        float32, once; None where that was not recorded."""
        received, self._by.received = self._by.received, None
        return received

    def __call__(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """Next-token logits of (1, n) tokens, (vocabulary,)."""
        if isinstance(self._by, FastProducts):
            with self._by:
                output = self._llm.model(
                    token_ids,
                    use_cache=True,
                    logits_to_keep=1,
                    **cache_argument(self._llm.model, cache),
                )
            logits: Tensor = output.logits[0, -1]
            return logits
        decoder: Any = self._llm.model.model
        x = decoder.embed_tokens(token_ids[0])
        cos, sin = decoder.rotary_emb(x, torch.arange(len(x))[None])
        rotation = cos[0][:, None], sin[0][:, None]
        layers = cache.whole_layers()
        self._by.last = layers[-1].index
        logits = next_logits(self._llm, self._by, x, rotation, layers)
        return logits[0].float()
