"""One decode step's operations, launched as Triton kernels, for vectors of a single token."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn

from dynamickv.decoding.decode_step import PlainOps, Slots
from dynamickv.decoding.kernels import (
    attend_kernel,
    gate_kernel,
    join_kernel,
    norm_kernel,
    place_kernel,
    project_kernel,
)
from dynamickv.fast.decoder import HeadNorms, Rotation

KEYS = 64
"""Keys an attention program reads at a time."""
SPLITS = 64
"""Most programs that share one head's keys."""
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class TritonOps(PlainOps):
    """`PlainOps` in one or two launches each."""

    rows: int = 2
    """Rows of weights that one program multiplies, even."""
    block: int = 2048
    """Columns it reads at a time."""
    warps: int = 4

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """One program for the whole vector."""
        out = torch.empty_like(x)
        size = x.shape[0]
        block = triton.next_power_of_2(size)
        norm_kernel[(1,)](
            x, weight, out, eps, SIZE=size, BLOCK=block, num_warps=min(block // 256, 16) or 1
        )
        return out

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """A program per few rows of whichever matrix."""
        ends = [0]
        for linear in linears:
            ends.append(ends[-1] + linear.weight.shape[0])
        ends = [*ends[1:], *[ends[-1]] * (3 - len(linears))]
        padded = [*linears, *[linears[-1]] * (3 - len(linears))]
        out = torch.empty(ends[-1], dtype=x.dtype, device=x.device)
        project_kernel[(triton.cdiv(ends[-1], self.rows),)](
            x,
            out,
            x if residual is None else residual,
            *(linear.weight for linear in padded),
            *(x if linear.bias is None else linear.bias for linear in padded),
            *ends,
            HAS_BIAS=linears[0].bias is not None,
            HAS_RESIDUAL=residual is not None,
            ROWS=self.rows,
            **self._columns(x),
        )
        return out

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """A program per few rows of both matrices."""
        rows, pairs = gate.weight.shape[0], self.rows // 2
        out = torch.empty(rows, dtype=x.dtype, device=x.device)
        gate_kernel[(triton.cdiv(rows, pairs),)](
            x, out, gate.weight, up.weight, rows, PAIRS=pairs, **self._columns(x)
        )
        return out

    def _columns(self, x: Tensor) -> dict[str, Any]:
        size = x.shape[0]
        block = min(self.block, triton.next_power_of_2(size))
        return {"SIZE": size, "BLOCK": block, "num_warps": self.warps}

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Slots,
        query_heads: int,
    ) -> Tensor:
        """A program per head."""
        stored, _, dim = store.keys.shape
        kv_heads = (qkv.shape[0] // dim - query_heads) // 2
        query = torch.empty(query_heads, dim, dtype=qkv.dtype, device=qkv.device)
        query_norm, key_norm, eps = norms or (qkv, qkv, 0.0)
        place_kernel[(query_heads + 2 * kv_heads,)](
            qkv,
            *rotation,
            query_norm,
            key_norm,
            query,
            *store,
            store.keys.stride(0),
            eps,
            HAS_NORM=norms is not None,
            QUERY_HEADS=query_heads,
            KV_HEADS=kv_heads,
            REPEAT=stored // kv_heads,
            DIM=dim,
            BLOCK=triton.next_power_of_2(dim),
            num_warps=1,
        )
        return query

    def attend(self, query: Tensor, store: Slots, scaling: float) -> Tensor:
        """Programs that share a head's keys, then one that joins their sums."""
        heads, room, dim = store.keys.shape
        query_heads = query.shape[0]
        group = query_heads // heads
        chunk = triton.cdiv(triton.cdiv(room, SPLITS), KEYS) * KEYS
        splits = triton.cdiv(room, chunk)
        sums = query.new_empty(query_heads, splits, dim, dtype=torch.float32)
        parts = (sums, *query.new_empty(2, query_heads, splits, dtype=torch.float32))
        # A matrix product wants 16 rows and columns at least.
        sizes = {"DIM": dim, "BLOCK": max(16, triton.next_power_of_2(dim)), "num_warps": 4}
        attend_kernel[(heads, splits)](
            query,
            *store,
            *parts,
            store.keys.stride(0),
            scaling * LOG2E,
            chunk,
            GROUP=group,
            ROWS=max(16, triton.next_power_of_2(group)),
            KEYS=KEYS,
            **sizes,
        )
        out = torch.empty(query_heads * dim, dtype=query.dtype, device=query.device)
        join_kernel[(query_heads,)](
            *parts, out, splits, SPLITS=triton.next_power_of_2(splits), **sizes
        )
        return out
