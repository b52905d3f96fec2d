"""Read and move tokens in one layer's paged KV cache, whatever order its kernels store them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST_EXACT = 256
"""Whole numbers up to here are exact in bfloat16."""


@dataclass(frozen=True)
class Pages:
    """One layer's cache and where in a block a key or value element lies."""

    layer: Any
    """vLLM's attention module; holds the cache and the backend's code."""
    cache: Tensor
    """(blocks, num_kv_heads, ...): what follows is the backend's own affair."""
    key_places: Tensor
    """(block_size, head_dim), places in a head's part of a block, flattened."""
    value_places: Tensor

    @classmethod
    def of(cls, layer: Any, block_size: int) -> Pages:
        """Find the places by letting the backend store tokens whose values tell where they go.

        Raises:
            ValueError: the cache is no plain copy of keys and values.
        """
        if max(block_size, layer.head_size) > LARGEST_EXACT:
            raise ValueError(
                f"block size {block_size} and head dimension {layer.head_size} must not exceed "
                f"{LARGEST_EXACT}; lower --block-size"
            )
        cache = layer.kv_cache
        if cache.shape[1] != layer.num_kv_heads or cache.shape[2] != block_size:
            raise ValueError(
                f"the KV cache has the shape {tuple(cache.shape)}, expected (blocks, "
                f"{layer.num_kv_heads}, {block_size}, ...); use another attention backend"
            )
        shape = (block_size, layer.num_kv_heads, layer.head_size)
        rows = torch.arange(1, block_size + 1, device=cache.device).view(-1, 1, 1).expand(shape)
        columns = torch.arange(1, layer.head_size + 1, device=cache.device).expand(shape)
        places = []
        for part in range(2):
            row, column = (
                _stored(layer, cache, numbers.to(cache.dtype), part) for numbers in (rows, columns)
            )
            found = torch.zeros(block_size, layer.head_size, dtype=torch.long, device=cache.device)
            written = row.nonzero()[:, 0]
            if written.shape[0] != found.numel():
                raise ValueError(
                    "the KV cache does not store keys and values as they are; use "
                    "--kv-cache-dtype auto and another attention backend"
                )
            found[row[written].long() - 1, column[written].long() - 1] = written
            places.append(found)
        return cls(layer, cache, *places)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.key_places.shape[0]

    def keys(self, blocks: Tensor, length: int) -> Tensor:
        """The first `length` keys that `blocks` hold, (num_kv_heads, length, head_dim)."""
        parts = self.cache[blocks].flatten(2).index_select(2, self.key_places.flatten())
        heads = parts.transpose(0, 1).reshape(parts.shape[1], -1, self.key_places.shape[1])
        return heads[:, :length]

    def pack(self, blocks: Tensor, positions: Tensor, target: Tensor) -> None:
        """Copy the tokens at `positions` of `blocks` into `target`.

        Args:
            blocks: block ids, in order.
            positions: (num_kv_heads, count), ascending per head; they may differ from head to head.
            target: ids of as many blocks as are filled.
        """
        heads = torch.arange(positions.shape[0], device=positions.device)[:, None, None]
        owners = (positions // self.block_size)[:, :, None]
        offsets = positions % self.block_size
        parts = self.cache[blocks].flatten(2)
        keys, values = (
            parts[owners, heads, places[offsets]] for places in (self.key_places, self.value_places)
        )
        numbers = torch.arange(positions.shape[1], device=positions.device)
        slots = target[numbers // self.block_size] * self.block_size + numbers % self.block_size
        _store(self.layer, self.cache, keys.transpose(0, 1), values.transpose(0, 1), slots)


def _stored(layer: Any, cache: Tensor, tokens: Tensor, part: int) -> Tensor:
    """The first head's part of a block after storing `tokens` as keys (part 0) or values (1)."""
    scratch = torch.zeros_like(cache[:1])
    zeros = torch.zeros_like(tokens)
    slots = torch.arange(tokens.shape[0], device=cache.device)
    _store(layer, scratch, *((tokens, zeros) if part == 0 else (zeros, tokens)), slots)
    return scratch[0, 0].flatten().float()


def _store(layer: Any, cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store (count, num_kv_heads, head_dim) tokens through the backend's own code."""
    layer.impl.do_kv_cache_update(layer, keys.contiguous(), values.contiguous(), cache, slots)
