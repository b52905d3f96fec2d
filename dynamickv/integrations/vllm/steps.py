"""What the scheduler tells the workers at every step, and what they tell it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamickv.integrations.vllm.compat import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True, slots=True)
class Started:
    """A request whose prompt is read, for the first time or again; its beginning may lie in the
    prefix cache."""

    name: str
    prompt_length: int
    blocks: list[int]
    """In the first compressed layer, behind what the prefix cache has: those may be another
    request's, which writes them in this very step."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """A request that goes on from a compressed prompt: its own after a preemption, or the one that
    a conversation's turn before it left."""

    name: str
    prompt_length: int
    """Of the prompt that was compressed."""
    kept: list[int]
    """Per compressed layer, blocks before the tail."""
    blocks: list[list[int]]
    """Per compressed layer, a new block table's row; null blocks in the gap."""
    windows: dict[str, list[int]]
    """By sliding layer, its new row; null blocks before the window."""


@dataclass(frozen=True)
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """Changes since the step before."""

    preempted: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    started: tuple[Started, ...] = ()
    resumed: tuple[Resumed, ...] = ()
    grown: dict[str, list[int]] = field(default_factory=dict)
    """New blocks of running requests in the first compressed layer."""
    rooms: dict[str, list[int]] = field(default_factory=dict)
    """Blocks for the compressed copies of the prompts that this step reads to their end."""


@dataclass
class Kept(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Prompts that were compressed in this step."""

    blocks: dict[str, list[int]] = field(default_factory=dict)
    """By request, per compressed layer: blocks kept before the tail."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join what two ranks tell, which is the same.

        Raises:
            ValueError: they chose other budgets.
        """
        if self.blocks != other.blocks:
            raise ValueError(f"two ranks kept different blocks: {self.blocks} and {other.blocks}")
        return self
