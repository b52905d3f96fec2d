"""KV caches whose layers may differ in kind and in length, with exact byte counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from dynamickv.layers.kv import BLOCK, AfterAttention, KVLayer, gather
from dynamickv.layers.other import HybridLayer, copied, in_batch, layer_bytes, own_layer
from dynamickv.layers.parts import BatchedLayer, HeadwiseLayer, stored_heads
from dynamickv.layers.rows import RowsLayer
from dynamickv.records import OtherLayer, Prefill, Retention

NAMED = {"chunked_attention": "chunked", "conv": "conv", "moe": "moe", "mlp": "mlp"}
"""Names of layers in a model's configuration that say more than the cache layer's class."""
CLASSES: dict[type, str] = {
    DynamicLayer: "full",
    DynamicSlidingWindowLayer: "sliding",
    LinearAttentionLayer: "linear",
    LinearAttentionAndFullAttentionLayer: "hybrid",
    LinearAttentionAndSlidingWindowAttentionLayer: "hybrid_sliding",
}
"""Names of transformers' cache layers."""
SHARED = "DummyLayer"
"""The class of a layer without a cache of its own, which transformers below 5.20 does not have."""
if hasattr(cache_utils, SHARED):
    CLASSES[getattr(cache_utils, SHARED)] = "shared"


def kinds_of(config: Any) -> tuple[str, ...]:
    """The kind of every layer, as in `record.kinds.KINDS`, by what transformers' own cache has
    for it; the class's name where that is a kind unknown here."""
    config = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    named = getattr(config, "layer_types", None) or [""] * len(layers)
    chunks = getattr(config, "attention_chunk_size", None) and not hasattr(config, "layer_types")
    kinds = []
    for layer, name in zip(layers, named, strict=False):
        kind = NAMED.get(name) or CLASSES.get(type(layer)) or type(layer).__name__
        kinds.append("chunked" if kind == "sliding" and chunks else kind)
    return tuple(kinds)


class KVCache(Cache):
    """One layer cache per layer; what `model(..., past_key_values=)` takes."""

    layers: list[Any]

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers=list(layers))

    @classmethod
    def of(cls, config: Any, after_attention: AfterAttention | None = None) -> KVCache:
        """An empty cache for a model: transformers' own layers, but `KVLayer` where the whole
        prompt is attended to."""
        return cls(fresh_layers(config, after_attention))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and states held, summed from the tensors."""
        return sum(map(layer_bytes, self.layers))

    @property
    def joinable(self) -> bool:
        """Whether a `BatchedCache` can hold this one: not where a layer carries a state beside the
        whole prompt, which would have to be in two places."""
        return not any(type(layer) is HybridLayer for layer in self.layers)

    @property
    def plain(self) -> bool:
        """Whether every layer attends to the whole prompt, and all its heads hold the same number
        of positions."""
        return all(type(layer) is KVLayer for layer in self.layers)

    def whole_layers(self) -> list[KVLayer]:
        """The layers that attend to the whole prompt, in order."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def others(self, kinds: Sequence[str]) -> dict[int, OtherLayer]:
        """What the other layers hold, by their place; later updates do not change it."""
        found = {}
        for place, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            if isinstance(layer, KVLayer):
                continue
            keys = getattr(layer, "keys", None)
            found[place] = OtherLayer(
                kind=kind,
                state=copied(layer),
                nbytes=layer_bytes(layer),
                held=0 if keys is None else keys.shape[2],
            )
        return found

    def states(self) -> dict[int, Any]:
        """Layers whose linear-attention state goes with compressed keys and values, by place."""
        return {
            place: layer for place, layer in enumerate(self.layers) if type(layer) is HybridLayer
        }

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many (given as a negative number) of the last tokens from every layer, or
        from none.

        Raises:
            ValueError: a layer cannot give them back.
        """
        # Transformers 5.17 gives a tensor, which every count would become.
        tokens_to_remove = int(tokens_to_remove)
        count = abs(tokens_to_remove)
        for place, layer in enumerate(self.layers):
            possible = layer.removable if isinstance(layer, KVLayer) else None
            if count and (not layer.is_croppable or (possible is not None and possible < count)):
                raise ValueError(
                    f"layer {place} cannot give back {count} tokens"
                    + (" of its state" if possible is None else f", it may give back {possible}")
                    + "; decode without drafts, or feed no more than was fed since the prompt"
                )
        super().crop(-count)


def fresh_layers(config: Any, after_attention: AfterAttention | None = None) -> list[Any]:
    """Empty layers of a cache for a model."""
    theirs = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return [own_layer(place, layer, after_attention) for place, layer in enumerate(theirs)]


class BatchedCache(Cache):
    """Several caches that have seen as much, seen by the model as one batch; each row attends to
    its own cache alone.

    Attention is computed once for all caches of about the same length, from a copy of them in
    rows: `order` says which cache became which row. Those alone in their kind, of heads of unlike
    length, and observed while they grow stay what they are and grow by themselves.
    """

    def __init__(self, caches: Sequence[KVCache], padded: float) -> None:
        """
        Args:
            caches: `joinable`.
            padded: how many times as long as the shortest of several in rows the longest may be; 0
                computes the attention of each cache apart.
        """
        kinds = [_shape(cache) for cache in caches]
        self.order = sorted(range(len(caches)), key=lambda row: (kinds[row] or ((), 0), row))
        parts: list[list[int]] = []
        for row in self.order:
            kind, first = kinds[row], kinds[parts[-1][0]] if parts else None
            if kind and first and kind[0] == first[0] and kind[1] <= padded * first[1]:
                parts[-1].append(row)
            else:
                parts.append([row])
        rows = [len(part) for part in parts]
        layers = []
        for place, layer in enumerate(caches[0].layers):
            of_all = [cache.layers[place] for cache in caches]
            if not isinstance(layer, KVLayer):
                layers.append(in_batch([of_all[row] for row in self.order]))
                continue
            held = [[of_all[row] for row in part] for part in parts]
            whole = [RowsLayer.of(part) if len(part) > 1 else part[0] for part in held]
            layers.append(BatchedLayer(whole, rows) if len(whole) > 1 else whole[0])
        super().__init__(layers=layers)


def rows_bytes(caches: Sequence[KVCache]) -> int:
    """What a copy of caches in rows takes at most: every layer as long as its longest, and room."""
    copied = 0
    of_all = [cache.whole_layers() for cache in caches if _shape(cache) is not None]
    for layers in zip(*of_all, strict=True):
        places = max(layer.length for layer in layers) + BLOCK
        copied += sum(places * layer.nbytes // max(layer.length, 1) for layer in layers)
    return copied


def _shape(cache: KVCache) -> tuple[tuple[int, ...], int] | None:
    """Heads of each layer that attends to the whole prompt, and the positions that all of them
    hold; None of a cache that cannot be one row of several."""
    layers = cache.whole_layers()
    if any(type(layer) is not KVLayer or layer.after_attention is not None for layer in layers):
        return None
    return tuple(layer.held()[0].shape[1] for layer in layers), sum(one.length for one in layers)


def prune(prefill: Prefill, retention: Retention, room: int) -> KVCache:
    """A cache of the retained positions, copied out of the prefill's, with room for `room` more
    tokens.

    With one choice per query head the layer stores query heads, each a copy of its KV head's rows.
    Layers that no method compresses hold what they held after the prefill.
    """
    seen = prefill.length
    layers = {place: copied(other.state) for place, other in prefill.others.items()}
    for place, keys, values, kept in zip(
        prefill.compressed_layers, prefill.keys, prefill.values, retention.indices, strict=True
    ):
        if not isinstance(kept, Tensor) and len(kept) == 1:
            kept = kept[0][None]
        if isinstance(kept, Tensor):
            layer = KVLayer(place)
            if place in prefill.states:
                layer = HybridLayer(place)
                layer.carry(prefill.states[place])
            layers[place] = _filled(layer, keys, values, kept, room, seen)
            continue
        heads = [
            _filled(
                KVLayer(place),
                keys[one : one + 1],
                values[one : one + 1],
                positions[None],
                room,
                seen,
            )
            for one, positions in zip(stored_heads(len(kept), keys.shape[0]), kept, strict=True)
        ]
        layers[place] = HeadwiseLayer(place, heads)
    return KVCache([layers[place] for place in range(len(layers))])


def _filled(
    layer: KVLayer, keys: Tensor, values: Tensor, kept: Tensor, room: int, seen: int
) -> KVLayer:
    layer.hold(gather(keys, kept, room), gather(values, kept, room), seen)
    layer.show(kept.shape[1])
    layer.choose(kept)
    return layer
