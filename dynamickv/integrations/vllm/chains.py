"""Conversations whose compressed prompt is still in the cache: a later turn goes on from it.

What a finished request leaves is one *chain*: its blocks, known by a hash of all tokens that it has
processed. Its blocks count as free; the pool takes them when it needs them, the longest unused
first, and the chain is gone. A turn that continues takes the chain away: there is one writer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from dynamickv.integrations.vllm.compat import BlockPool, KVCacheBlock, Request


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """A compressed prompt and what was read and answered after it."""

    key: Hashable
    length: int
    """Tokens processed, those dropped included."""
    prompt_length: int
    """Of the prompt that was compressed."""
    kept: list[int]
    """Per compressed layer, blocks before the tail."""
    rows: list[list[KVCacheBlock]]
    """Per compressed layer; null blocks in the gap."""


class Chains:
    """All chains that nobody is writing to."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._chains: dict[Hashable, Chain] = {}
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._chains)

    def key(self, request: Request, length: int) -> Hashable:
        """Names the first `length` tokens of a request, a block or more, by vLLM's own block hash,
        which knows the cache salt and the adapter, and the tokens after the last whole block."""
        whole = length // self._block_size
        rest = tuple(request.all_token_ids[whole * self._block_size : length])
        return request.block_hashes[whole - 1], rest

    def find(self, request: Request) -> Chain | None:
        """The longest chain that a request's prompt begins with and goes on from."""
        for length in sorted(self._lengths, reverse=True):
            if length < request.num_tokens:
                chain = self._chains.get(self.key(request, length))
                if chain is not None:
                    return chain
        return None

    def keep(self, chain: Chain, pool: BlockPool) -> None:
        """Leave a chain in the cache, in the place of one that says the same."""
        self.drop(self._chains.get(chain.key))
        self._chains[chain.key] = chain
        self._lengths[chain.length] += 1
        for row in chain.rows:
            blocks = [block for block in row if not block.is_null]
            pool.unpin_blocks(blocks, on_reuse=lambda _: self.drop(chain))

    def drop(self, chain: Chain | None) -> None:
        """A chain was taken by its next turn, or one of its blocks by someone else."""
        if chain is None or self._chains.get(chain.key) is not chain:
            return
        del self._chains[chain.key]
        self._lengths[chain.length] -= 1
        if not self._lengths[chain.length]:
            del self._lengths[chain.length]

    def clear(self) -> None:
        """Forget all; their blocks are free as it is."""
        self._chains.clear()
        self._lengths.clear()
