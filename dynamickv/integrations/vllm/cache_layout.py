"""How vLLM's scheduler accounts for the blocks of compressed layers: one cache group per layer, so
that each keeps as many blocks as its own budget needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from dynamickv.integrations.vllm.compat import (
    FullAttentionManager,
    FullAttentionSpec,
    KVCacheBlock,
    KVCacheSpec,
    Request,
)


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):  # type: ignore[misc]
    """The cache of one layer, unlike any other layer's, so that vLLM groups it with no other."""

    identity: int = field(default_factory=count().__next__)
    """Counted in the order of the layers: all ranks must say the same of a layer."""
    tail: int = 1
    """Last tokens of a prompt that are read in any case, for their queries."""

    @classmethod
    def merge(cls, specs: list[CompressedSpec]) -> CompressedSpec:
        """A group's spec; AssertionError, as vLLM expects, for more than one layer. Groups are
        alike, so that vLLM looks up a prefix in all of them at once."""
        if len(specs) != 1:
            raise AssertionError("every compressed layer has a cache group of its own")
        return replace(specs[0], identity=-1)

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


@dataclass(frozen=True, slots=True)
class Awaited:
    """A prompt that will be compressed."""

    prompt_length: int
    room: int
    """Blocks set aside for the copies of all layers; all of them by the first layer."""


class CompressedManager(FullAttentionManager):  # type: ignore[misc]
    """Blocks of one layer. Once a prompt is compressed they are a copy of what was chosen, a gap,
    and the blocks of the observation window and of the answer. The blocks that the prompt was read
    into are never written to again: they stay in the prefix cache for other prompts."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._awaited: dict[str, Awaited] = {}
        self._rooms: dict[str, list[KVCacheBlock]] = {}
        self._gaps: dict[str, Gap] = {}
        self._rows: dict[str, list[KVCacheBlock]] = {}

    @classmethod
    def find_longest_cache_hit(
        cls, *arguments: Any, max_length: int, kv_cache_spec: CompressedSpec, **named: Any
    ) -> Any:
        """As the base class, but the tokens of the observation window are read in any case."""
        length = max(max_length + 1 - kv_cache_spec.tail, 0)
        return super().find_longest_cache_hit(
            *arguments, max_length=length, kv_cache_spec=kv_cache_spec, **named
        )

    # What the connector tells.

    def await_prompt(self, request_id: str, awaited: Awaited) -> None:
        """A prompt will be compressed."""
        self._awaited[request_id] = awaited

    def room(self, request_id: str) -> list[KVCacheBlock]:
        """Blocks set aside for a prompt, once its last part is scheduled."""
        return self._rooms.get(request_id, [])

    def settle(self, request_id: str, copy: Sequence[KVCacheBlock], tail_block: int) -> None:
        """A prompt was compressed into `copy`, or stayed whole up to the tail where that is empty;
        what it was read into goes back to the pool."""
        self._awaited.pop(request_id, None)
        first = len(copy) or tail_block
        self._gaps[request_id] = gap = Gap(first, tail_block)
        row = self.req_to_blocks.get(request_id)
        if row is not None and copy:
            whole, row[:tail_block] = row[:tail_block], [*copy, *[self._null_block] * len(gap)]
            self.block_pool.free_blocks(reversed(whole))

    def close_room(self, request_id: str, used: int) -> None:
        """Give back what was set aside beyond the first `used` blocks."""
        room = self._rooms.pop(request_id, [])
        self.block_pool.free_blocks(room[used:])

    def resume(self, request_id: str, gap: Gap, row: list[KVCacheBlock]) -> None:
        """A new request may take over a compressed prompt's blocks."""
        self._gaps[request_id] = gap
        self._rows[request_id] = row

    def forget(self, request_id: str) -> None:
        """The request is over. Until then the gap is remembered, also while it is preempted."""
        for kept in (self._awaited, self._gaps, self._rows):
            kept.pop(request_id, None)

    # What vLLM asks.

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *arguments: Any, **named: Any
    ) -> int:
        """As the base class, and the room for a compressed copy with the prompt's last part; one
        that goes on from a compressed prompt needs no blocks in the gap."""
        gap = self._gaps.get(request_id)
        if gap is not None and not self.req_to_blocks.get(request_id):
            needed: int = -(-num_tokens // self.block_size)
            row = self._rows.get(request_id)
            if row is None:
                return needed - len(gap)
            idle: int = self._get_num_evictable_blocks(row)
            return needed - len(row) + idle
        needed = super().get_num_blocks_to_allocate(request_id, num_tokens, *arguments, **named)
        return needed + self._missing_room(request_id, num_tokens)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *rest: Any, **named: Any
    ) -> None:
        """As the base class; who goes on from a compressed prompt uses nothing else."""
        if request_id not in self._gaps:
            super().add_local_computed_blocks(request_id, new_computed_blocks, *rest, **named)
            return
        row = self._rows.pop(request_id, [])
        self.block_pool.touch([block for block in row if not block.is_null])
        self.req_to_blocks[request_id] = list(row)
        self.num_cached_block[request_id] = 0

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *rest: Any,
        **named: Any,
    ) -> None:
        """Blocks to restore a preempted request into; its gap stays empty."""
        gap = self._gaps.get(request_id)
        row = self.req_to_blocks[request_id]
        if gap is not None and not row:
            tokens = num_local_computed_tokens + num_external_computed_tokens
            blocks = self.block_pool.get_new_blocks(-(-tokens // self.block_size) - len(gap))
            row += [*blocks[: gap.first], *[self._null_block] * len(gap), *blocks[gap.first :]]
        if gap is None:
            super().allocate_external_computed_blocks(
                request_id, num_local_computed_tokens, num_external_computed_tokens, *rest, **named
            )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *arguments: Any, **named: Any
    ) -> list[KVCacheBlock]:
        """As the base class; the room is taken with the blocks of the prompt's last part."""
        room = self._missing_room(request_id, num_tokens)
        if room:
            self._rooms[request_id] = self.block_pool.get_new_blocks(room)
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, num_tokens, *arguments, **named
        )
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *rest: Any, **named: Any) -> None:
        """As the base class, up to the end of a prompt that is compressed: what is computed from a
        compressed prompt is of no use to others."""
        if request.request_id in self._gaps:
            return
        awaited = self._awaited.get(request.request_id)
        if awaited is not None:
            num_tokens = min(num_tokens, awaited.prompt_length)
        super().cache_blocks(request, num_tokens, *rest, **named)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As the base class, the room included."""
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return [*blocks, *self._rooms.pop(request_id, [])]

    def _missing_room(self, request_id: str, num_tokens: int) -> int:
        awaited = self._awaited.get(request_id)
        if awaited is None or num_tokens < awaited.prompt_length or request_id in self._rooms:
            return 0
        return awaited.room
