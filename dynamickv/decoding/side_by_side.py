"""The same tokens under several caches in one pass, from packed weights, which are read once for
all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dynamickv.cache import KVCache
from dynamickv.fast.blockwise import causal_attention
from dynamickv.fast.decoder import HeadNorms, Rotation, linears_of, through
from dynamickv.fast.many_rows import ManyRows
from dynamickv.fast.packed import PackedWeights
from dynamickv.layers.kv import KVLayer
from dynamickv.models import LoadedModel


class CachesOps(ManyRows[Sequence[KVLayer]]):
    """Rows of one cache after those of another, as many of each."""

    def __init__(self, packed: PackedWeights, caches: int) -> None:
        super().__init__(packed)
        self._caches = caches

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Sequence[KVLayer],
        query_heads: int,
    ) -> Tensor:
        """Append each cache's rows to it."""
        query, *states = self.turned(qkv, rotation, norms, query_heads)
        parts = (state[None].chunk(self._caches, dim=2) for state in states)
        for layer, keys, values in zip(store, *parts, strict=True):
            layer.append(keys, values)
        return query

    def attend(self, query: Tensor, store: Sequence[KVLayer], scaling: float) -> Tensor:
        """Each cache's rows attend to it, causally to one another."""
        contexts = []
        for layer, own in zip(store, query.chunk(self._caches, dim=1), strict=True):
            keys, values = layer.held()
            contexts.append(causal_attention(own, keys[0], values[0], scaling)[0])
        return torch.cat(contexts).flatten(1)


@torch.inference_mode()
def follow_all(
    llm: LoadedModel,
    packed: PackedWeights,
    caches: Sequence[KVCache],
    token_ids: Sequence[int],
    position: int,
    block: int = 64,
) -> Iterator[tuple[int, Tensor]]:
    """Feed given tokens to each of several caches, as `follow` does to one.

    Args:
        llm: `packed_throughout`.
        caches: `plain`; each grows by all tokens.
        position: true position of the first token.
        block: most tokens at a time.

    Yields:
        for every block and each cache its number and its next-token logits, (tokens, vocabulary):
        one after the other, as those of a large vocabulary take much memory.
    """
    model: Any = llm.model
    decoder = model.model
    packed.prepare(linears_of(llm), few=False)
    ops = CachesOps(packed, len(caches))
    layers = list(zip(*(cache.whole_layers() for cache in caches), strict=True))
    for start in range(0, len(token_ids), block):
        part = torch.tensor(token_ids[start : start + block])
        x = decoder.embed_tokens(part.repeat(len(caches)))
        places = position + start + torch.arange(len(part)).repeat(len(caches))
        cos, sin = decoder.rotary_emb(x, places[None])
        rotation = cos[0][:, None], sin[0][:, None]
        x = through(llm, ops, x, rotation, decoder.layers, layers)
        for number, own in enumerate(x.chunk(len(caches))):
            yield number, ops.logits(own, decoder.norm, model.lm_head)
