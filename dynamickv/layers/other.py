"""Layers that hold more or other than keys and values of the whole prompt.

transformers' own, where no method compresses; `HybridLayer` where a state goes beside.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from dynamickv.layers.kv import AfterAttention, KVLayer


class SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding-window or chunked layer, as transformers caches it; no method touches it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers does, without keeping a whole prompt alive behind a slice of it."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        if self.keys.shape[2] + 1 < keys.shape[2]:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return keys, values


class HybridLayer(LinearAttentionLayer, KVLayer):  # type: ignore[no-untyped-call,misc]
    """A layer that attends to the whole prompt and carries a linear-attention state besides."""

    is_compileable = False

    def __init__(
        self, index: int, after_attention: AfterAttention | None = None, states: int = 1
    ) -> None:
        KVLayer.__init__(self, index, after_attention)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can put it back, which a recurrent state forbids."""
        return bool(LinearAttentionLayer.is_croppable.fget(self))  # type: ignore[attr-defined]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and states held."""
        return KVLayer.nbytes.fget(self) + state_bytes(self)  # type: ignore[attr-defined,no-any-return]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values where they are given in place, of states where they are named."""
        kind = KVLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def carry(self, states: LinearAttentionCacheLayerMixin) -> None:
        """Take over a copy of another layer's linear-attention state."""
        self.__dict__.update(_copied_states(states))

    def crop(self, tokens_to_remove: int) -> None:
        """As both parts do."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        KVLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        KVLayer.reset(self)


def own_layer(place: int, theirs: Any, after_attention: AfterAttention | None) -> Any:
    """What stands for one of transformers' fresh cache layers here: `KVLayer` for full attention;
    the others serve as they are."""
    if type(theirs) is DynamicLayer:
        return KVLayer(place, after_attention)
    if type(theirs) is LinearAttentionAndFullAttentionLayer:
        return HybridLayer(place, after_attention, theirs.number_of_states)
    if type(theirs) is DynamicSlidingWindowLayer:
        return SlidingLayer(theirs.sliding_window)
    return theirs


def copied(layer: Any) -> Any:
    """A layer that holds the same; updates of one do not reach the other."""
    other = copy.copy(layer)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        other.__dict__.update(_copied_states(layer))
    return other


def _copied_states(layer: LinearAttentionCacheLayerMixin) -> dict[str, Any]:
    """Attributes of the linear-attention part, whose tensors are written in place."""
    names = LinearAttentionLayer(number_of_states=layer.number_of_states).__dict__
    return {
        name: {
            key: entry.clone() if isinstance(entry, Tensor) else entry
            for key, entry in value.items()
        }
        if isinstance(value, dict)
        else value
        for name, value in ((name, getattr(layer, name)) for name in names)
    }


def in_batch(layers: Sequence[Any]) -> Any:
    """One layer of all rows of the same layer of several caches that have seen as much; a copy."""
    whole = copied(layers[0])
    for name in vars(whole):
        setattr(whole, name, _joined([getattr(layer, name) for layer in layers]))
    return whole


def _joined(values: Sequence[Any]) -> Any:
    """Tensors of rows one after another; what is said of every cache, once."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values]) for name in first}
    return torch.cat(list(values)) if isinstance(first, Tensor) and first.dim() else first


def state_bytes(layer: Any) -> int:
    """Bytes of a layer's linear-attention states."""
    states = [
        *getattr(layer, "conv_states", {}).values(),
        *getattr(layer, "recurrent_states", {}).values(),
    ]
    return sum(state.numel() * state.element_size() for state in states if state is not None)


def layer_bytes(layer: Any) -> int:
    """Bytes of all that a layer holds, of whatever kind it is."""
    if isinstance(layer, KVLayer):
        return layer.nbytes
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    tensors = sum(t.numel() * t.element_size() for t in held if t is not None)
    return int(tensors + state_bytes(layer))
