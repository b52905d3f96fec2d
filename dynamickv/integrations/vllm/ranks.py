"""Tensor parallelism: every rank holds some of a layer's heads, and all must keep the same.

What the heads of one rank pay to the prompt is small beside its keys: it is gathered, so that every
rank chooses for all heads, as one rank does, and cuts its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dynamickv.methods import CompressionMethod, ScoredMethod
from dynamickv.records import LayerObservation


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among its group's."""

    count: int = 1
    rank: int = 0
    gather: Callable[[Tensor, int], Tensor] = lambda tensor, dim: tensor
    """All ranks' tensors joined along a dimension, in the order of the ranks."""

    @classmethod
    def of_group(cls) -> Ranks:
        """vLLM's tensor parallel group."""
        from dynamickv.integrations.vllm.compat import get_tp_group

        group = get_tp_group()
        return cls(group.world_size, group.rank_in_group, group.all_gather)

    def observation(
        self, method: CompressionMethod, queries: Tensor, keys: Tensor, scaling: float
    ) -> LayerObservation:
        """What a method reads of a layer: of all ranks' heads where heads or layers compete; other
        methods choose for every head by itself."""
        if self.count == 1 or not isinstance(method, ScoredMethod):
            return LayerObservation(queries=queries, keys=keys, scaling=scaling)
        return SharedObservation(queries=queries, keys=keys, scaling=scaling, ranks=self)

    def own(self, method: CompressionMethod, positions: Tensor) -> Tensor:
        """This rank's heads among those chosen for."""
        if self.count == 1 or not isinstance(method, ScoredMethod):
            return positions
        return positions.chunk(self.count)[self.rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedObservation(LayerObservation):
    """A layer whose heads lie on several ranks; queries and keys are this rank's."""

    ranks: Ranks

    @property
    def num_kv_heads(self) -> int:
        """Of all ranks."""
        return self.keys.shape[0] * self.ranks.count

    @property
    def num_query_heads(self) -> int:
        """Of all ranks."""
        return self.queries.shape[0] * self.ranks.count

    def attention(self, first: int, last: int = 0) -> Tensor:
        """As `LayerObservation.attention`, of all ranks' heads."""
        return self.ranks.gather(LayerObservation.attention(self, first, last), 0)

    def moments(self, first: int) -> Tensor:
        """As `LayerObservation.moments`, of all ranks' heads."""
        return self.ranks.gather(LayerObservation.moments(self, first), 1)
