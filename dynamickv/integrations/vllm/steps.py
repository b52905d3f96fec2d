"""What the scheduler tells the workers at every step, and what they tell it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True, slots=True)
class Started:
    """A request whose prompt is read from its first token on, for the first time or again."""

    name: str
    prompt_length: int
    first_block: int
    """In the first cache group."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A preempted request that goes on where it was."""

    name: str
    blocks: tuple[list[int], ...]
    """Per cache group, a new block table's row; null blocks in the gap."""


@dataclass(frozen=True)
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """Changes since the step before."""

    preempted: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    started: tuple[Started, ...] = ()
    restored: tuple[Restored, ...] = ()


@dataclass
class Kept(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Prompts that were compressed in this step."""

    blocks: dict[str, list[int]] = field(default_factory=dict)
    """By request, per cache group: blocks kept before the tail."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join what two workers tell."""
        return Kept({**self.blocks, **other.blocks})
