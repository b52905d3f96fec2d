"""Many positions' way through a decoder from packed weights, one row for each: a whole prompt's, or
the same tokens' under several caches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynamickv.fast.decoder import HeadNorms, Ops, Rotation, Store
from dynamickv.fast.heads import turn
from dynamickv.fast.packed import PackedWeights
from dynamickv.fast.sums import normed_rows

ROWS = 512
"""Positions that small operations take at a time, so that they stay in the cache."""


class ManyRows(Ops[Store]):
    """The sum that runs through the layers stays float32; what a product reads is
    bfloat16, but of few rows (see packed.py)."""

    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        return self._packed.product(x, linear)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension, bfloat16."""
        if x.dim() > 2:
            return super().norm(x, weight, eps)
        return normed_rows(x, weight, eps)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """In one product, added in place to the residual of the positions that go on."""
        if residual is None:
            return self._packed.product(x, *linears)
        residual = residual[-len(x) :]
        self._packed.add_product(residual, x, *linears)
        return residual

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """In as few passes over the rows as there are."""
        return self._packed.gated(x, gate, up)

    def turned(
        self, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, query_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Head by head all rows' queries, (query_heads, rows, head_dim) float32, and keys and
        values, (kv_heads, rows, head_dim) bfloat16, normalised and rotated."""
        cos, sin = rotation
        if norms is None:
            return turn(qkv, cos[:, 0], sin[:, 0], query_heads)
        length, dim = len(qkv), cos.shape[-1]
        kv_heads = (qkv.shape[1] // dim - query_heads) // 2
        query = torch.empty(query_heads, length, dim)
        keys = torch.empty(kv_heads, length, dim, dtype=torch.bfloat16)
        values = torch.empty_like(keys)
        for start in range(0, length, ROWS):
            rows = slice(start, start + ROWS)
            parts = self.split(qkv[rows].float(), (cos[rows], sin[rows]), norms, query_heads)
            for whole, part in zip((query, keys, values), parts, strict=True):
                whole[:, rows] = part.transpose(0, 1)
        return query, keys, values

    def logits(self, x: Tensor, norm: nn.Module, head: nn.Linear) -> Tensor:
        """Next-token logits after some rows, (rows, vocabulary) float32."""
        last = super().norm(x, norm.weight, norm.variance_epsilon)  # type: ignore[arg-type]
        return self._packed.logits(last, head)
