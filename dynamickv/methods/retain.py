"""A method's choice from bare tensors: no model, no tokenizer, no cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamickv.methods import CompressionMethod
from dynamickv.records import LayerObservation, Retention
from dynamickv.scoring import attention_mass


@torch.no_grad()
def retain(
    method: CompressionMethod,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None = None,
    scaling: float | None = None,
) -> Retention:
    """Which prompt positions a method keeps, given every layer's post-RoPE queries and keys, and
    values where it reads them (LAVa).

    Args:
        queries: per layer, (1, num_query_heads, n, head_dim); the last `window_size` positions are
            enough for window-scored methods.
        keys: per layer, (1, num_kv_heads, n, head_dim).
        values: per layer, (1, num_kv_heads, n, value_dim).
        scaling: factor on query-key products; head_dim ** -0.5 by default.

    Raises:
        ValueError: shapes that do not belong together, no layers, an empty prompt, or values that
        are not finite.
    """
    if not isinstance(method, CompressionMethod):
        raise ValueError(
            f"{method!r} is not a method; give an instance such as dynamickv.SnapKV(capacity=64)"
        )
    if len(queries) != len(keys) or not keys:
        raise ValueError(
            f"queries and keys need one tensor per layer each, got {len(queries)} and {len(keys)}"
        )
    if values is not None and len(values) != len(keys):
        raise ValueError(
            f"values need one tensor per layer, got {len(values)} for {len(keys)} layers"
        )
    given = [None] * len(keys) if values is None else values
    for layer, (query, key, value) in enumerate(zip(queries, keys, given, strict=True)):
        _check_layer(layer, query, key, keys[0].shape)
        if value is not None:
            _check_values(layer, key, value)
    factor = keys[0].shape[-1] ** -0.5 if scaling is None else scaling
    return method.select(
        [
            LayerObservation(
                queries=query[0],
                keys=key[0],
                scaling=factor,
                values=None if value is None else value[0],
                mass=attention_mass(query[0], key[0], factor)
                if method.needs_mass and query.shape[2] == key.shape[2]
                else None,
            )
            for query, key, value in zip(queries, keys, given, strict=True)
        ]
    )


def _check_layer(layer: int, query: Tensor, key: Tensor, expected: torch.Size) -> None:
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)):
        raise ValueError(
            f"layer {layer}: queries are {type(query).__name__}, keys {type(key).__name__}; "
            "give torch tensors"
        )
    where = f"layer {layer}: queries {tuple(query.shape)}, keys {tuple(key.shape)}"
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != 1 or key.shape[0] != 1:
        raise ValueError(f"{where}; expected (1, heads, n, head_dim) each")
    if key.shape[2] == 0:
        raise ValueError(f"{where}; the prompt is empty, give at least one position")
    if key.shape != expected:
        raise ValueError(f"{where}; expected keys of shape {tuple(expected)} as in layer 0")
    if (
        query.shape[3] != key.shape[3]
        or query.shape[1] % key.shape[1]
        or query.shape[2] > key.shape[2]
    ):
        raise ValueError(
            f"{where}; query heads must be a multiple of KV heads, head_dim equal, "
            "and queries no longer than keys"
        )
    if not (torch.isfinite(query).all() and torch.isfinite(key).all()):
        raise ValueError(
            f"{where}; they hold NaN or infinity, compute them again in a wider number format"
        )


def _check_values(layer: int, key: Tensor, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"layer {layer}: values are {type(value).__name__}; give torch tensors")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"layer {layer}: keys {tuple(key.shape)}, values {tuple(value.shape)}; "
            "expected (1, num_kv_heads, n, value_dim) for the same heads and positions"
        )
    if not torch.isfinite(value).all():
        raise ValueError(
            f"layer {layer}: values {tuple(value.shape)} hold NaN or infinity, "
            "compute them again in a wider number format"
        )
