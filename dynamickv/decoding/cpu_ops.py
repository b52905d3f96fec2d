"""The operations of a decoder's step on a CPU: one row for each of several caches. fast_ops.py has
those of precision "fast"."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamickv.fast.decoder import HeadNorms, Ops, Rotation
from dynamickv.layers.kv import KVLayer
from dynamickv.records import Attended


class CpuOps(Ops[Sequence[KVLayer]]):
    """Torch operations in float32 on a row for each of several caches."""

    least_rows = 1

    @staticmethod
    def fastest() -> CpuOps:
        """As MKL multiplies on this CPU, which a step is bound by: it reads all weights."""
        return CpuOps() if is_intel() else ColumnOps()

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        return F.linear(x, linear.weight, linear.bias)

    def place(
        self,
        qkv: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        store: Sequence[KVLayer],
        query_heads: int,
    ) -> Tensor:
        """Append each row to its own cache."""
        query, key, value = self.split(qkv, rotation, norms, query_heads)
        keys, values = key.unsqueeze(2), value.unsqueeze(2)
        for row, layer in enumerate(store):
            layer.append(keys[row : row + 1], values[row : row + 1])
        return query

    def attend(self, query: Tensor, store: Sequence[KVLayer], scaling: float) -> Tensor:
        """Each row attends to its own cache."""
        rows, _, dim = query.shape
        output = query.new_zeros(rows, query.shape[1] * dim)
        for row, layer in enumerate(store):
            keys, values = layer.held()
            # The queries of one head's group as rows: no head is repeated.
            grouped = query[row].view(1, keys.shape[1], -1, dim)
            attended = F.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
            output[row] = attended.reshape(-1)
            show(layer, query[row], scaling)
        return output


class ColumnOps(CpuOps):
    """CpuOps for CPUs on which MKL multiplies a matrix with a vector slowly: with a row of padding
    behind a single one, which no cache sees."""

    least_rows = 2

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        # As the left factor of a product with few columns, but two at least, MKL reads the weights
        # with all cores on AMD's CPUs (at twice the speed of F.linear's product; on Intel's at
        # half). The next product is several times slower unless its input's rows are contiguous.
        out = torch.mm(linear.weight, x.t()).t().contiguous()
        return out if linear.bias is None else out + linear.bias


def is_intel(told: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU is Intel's; without an answer, no."""
    named = told.read_text("utf-8", "replace")[:4096] if told.exists() else platform.processor()
    return "GenuineIntel" in named


class PackedOps(CpuOps):
    """CpuOps that read the weights from a copy in oneDNN's own order, of which a product with a few
    rows takes about half the time of MKL's. The copy is as large as the weights, and made as they
    are needed."""

    def __init__(self) -> None:
        self._packed: dict[tuple[nn.Linear, ...], tuple[Tensor, Tensor | None]] = {}

    @staticmethod
    def available() -> bool:
        """Whether torch brings oneDNN's products, which its compiler uses and does not document."""
        known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
        return known and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

    def linear(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """One projection."""
        return self._product(x, linear)

    def project(self, x: Tensor, *linears: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """Projections of one input in one product."""
        joined = self._product(x, *linears)
        return joined if residual is None else residual + joined

    def gate(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """Both in one product."""
        gated, raised = self._product(x, gate, up).chunk(2, dim=-1)
        return F.silu(gated) * raised

    def _product(self, x: Tensor, *linears: nn.Linear) -> Tensor:
        if linears not in self._packed:
            weights: list[Tensor] = [linear.weight for linear in linears]
            packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
            biases: list[Tensor] = [
                weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
                for linear, weight in zip(linears, weights, strict=True)
            ]
            biased = any(linear.bias is not None for linear in linears)
            self._packed[linears] = packed, torch.cat(biases) if biased else None
        weight, bias = self._packed[linears]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out


def show(layer: KVLayer, query: Tensor, scaling: float) -> None:
    """Let a layer that asks for it see the query of its token, (query_heads, head_dim)."""
    if layer.after_attention is not None:
        queries, (keys, _) = query[None, :, None], layer.held()
        layer.after_attention(layer, Attended(queries=queries, keys=keys, scaling=scaling))
