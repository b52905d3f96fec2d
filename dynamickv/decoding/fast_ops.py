"""The operations of a decoder's step on a CPU in precision "fast": products from packed weights,
and what lies between them compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamickv.decoding.cpu_ops import CpuOps, show
from dynamickv.fast import kernels
from dynamickv.fast.attention import attend
from dynamickv.fast.decoder import HeadNorms, Rotation
from dynamickv.fast.kernels import bits
from dynamickv.fast.packed import PackedWeights
from dynamickv.layers.kv import KVLayer


class FastOps(CpuOps):
    """One row and more. What products of codes read and give stays float32, of others it is
    bfloat16; so does the sum that runs through the layers."""

    least_rows = 1

    def __init__(self, packed: PackedWeights) -> None:
        self._weights = packed

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        return self._weights.product(x, linear)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        if x.dim() > 2:
            return F.rms_norm(x, weight.shape, weight, eps)
        return kernels.normed(x, weight, eps)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Projections of one input in one product, added to the residual in place."""
        joined = self._weights.product(x, *linears)
        if residual is None:
            return joined
        kernels.add(residual.numpy(), bits(joined))
        return residual

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """In as few passes as there are."""
        return self._weights.gated(x, gate, up)

    def speak(self, x: Tensor, norm: Any, head: nn.Linear) -> Tensor:
        """At least the likeliest tokens' unrounded."""
        normal = F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
        return self._weights.logits(normal, head)

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Sequence[KVLayer],
        query_heads: int,
    ) -> Tensor:
        """Append each row to its own cache."""
        if norms is not None:
            return super().place(qkv.float(), rotation, norms, store, query_heads)
        cos, sin = (turn[:, 0].numpy() for turn in rotation)
        query = torch.empty(len(qkv), query_heads, cos.shape[-1])
        table = []
        for layer in store:
            slot = layer.advance(1)
            keys, values = layer.buffers
            _, heads, room, _ = keys.shape
            narrowed = keys.dtype == torch.bfloat16
            table.append((keys.data_ptr(), values.data_ptr(), heads, room, slot, narrowed))
        kernels.place(bits(qkv), cos, sin, query.numpy(), np.array(table, np.int64))
        return query

    def attend(self, query: Tensor, store: Sequence[KVLayer], scaling: float) -> Tensor:
        """Each row attends to its own cache."""
        out = torch.empty(query.shape)
        attend(query, [(*layer.buffers, layer.length) for layer in store], scaling, out)
        for row, layer in enumerate(store):
            show(layer, query[row], scaling)
        return out.flatten(1)
