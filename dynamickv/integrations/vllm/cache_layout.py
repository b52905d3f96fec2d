"""How vLLM's scheduler accounts for the blocks of compressed layers: one cache group per layer, so
that each keeps as many blocks as its own budget needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):  # type: ignore[misc]
    """The cache of one layer, unlike any other layer's, so that vLLM groups it with no other."""

    identity: str = field(default_factory=lambda: uuid4().hex)

    @classmethod
    def merge(cls, specs: list[CompressedSpec]) -> CompressedSpec:
        """A group's spec; AssertionError, as vLLM expects, for more than one layer."""
        if len(specs) != 1:
            raise AssertionError("every compressed layer has a cache group of its own")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """No block table may serve several layers."""
        return len(kv_cache_specs) == 1


@dataclass(frozen=True, slots=True)
class Gap:
    """Blocks of a prompt that a layer no longer needs: `first` up to, not including, `end`."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


class CompressedManager(FullAttentionManager):  # type: ignore[misc]
    """Blocks of one layer. Once a prompt is compressed it consists of its first blocks, which hold
    what was chosen, a gap, and the blocks of the observation window and of the answer."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._gaps: dict[str, Gap] = {}

    def release(self, request_id: str, gap: Gap) -> None:
        """Give a compressed prompt's spare blocks back to the pool; null blocks fill the gap."""
        self._gaps[request_id] = gap
        self._remove_blocks_in_range(request_id, gap.first, gap.end)

    def forget(self, request_id: str) -> None:
        """The request is over. Until then the gap is remembered, also while it is preempted."""
        self._gaps.pop(request_id, None)

    def get_num_blocks_to_allocate(self, request_id: str, *arguments: Any, **named: Any) -> int:
        """As the base class, without the gap of a preempted request that is to be restored."""
        count: int = super().get_num_blocks_to_allocate(request_id, *arguments, **named)
        gap = self._gaps.get(request_id)
        if gap is None or self.req_to_blocks.get(request_id):
            return count
        return count - len(gap)

    def allocate_external_computed_blocks(
        self, request_id: str, *arguments: Any, **named: Any
    ) -> None:
        """Blocks to restore a preempted request into; its gap stays empty."""
        gap = self._gaps.get(request_id)
        if gap is not None and not self.req_to_blocks[request_id]:
            first = self.block_pool.get_new_blocks(gap.first)
            self.req_to_blocks[request_id] = [*first, *[self._null_block] * len(gap)]
        super().allocate_external_computed_blocks(request_id, *arguments, **named)
