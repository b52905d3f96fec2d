"""What happens to requests in the process that runs the model: prompts are watched while they are
read, compressed after their last chunk, and from then on found in fewer blocks.

A row of a batch is known by its first block in the first layer: no two live requests share it, and
it is freed no earlier than the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from dynamickv.integrations.vllm.blocks import BlockPlan, kept_before_tail
from dynamickv.integrations.vllm.pages import Pages
from dynamickv.integrations.vllm.steps import Step
from dynamickv.methods import CompressionMethod
from dynamickv.records import LayerObservation

logger = init_logger("vllm.dynamickv")


@dataclass
class Watched:
    """A request whose prompt does not fit its budget."""

    name: str
    plan: BlockPlan
    first_block: int
    """In the first layer; -1 while it is preempted."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the last queries read so far, (tail, num_query_heads, head_dim)."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the blocks of the last step, without the gap."""
    length: int = 0
    """Tokens read and written up to the last step, those dropped since included."""
    kept: list[int] = field(default_factory=list)
    """Per layer, blocks before the tail; empty until the prompt is compressed."""
    saved: list[Tensor] = field(default_factory=list)
    """Per layer, the contents of its blocks while it is preempted."""

    def held_blocks(self, layer: int) -> int:
        """Blocks that hold its tokens in a layer."""
        written = -(-self.length // self.plan.block_size)
        return written - self.plan.tail_block + self.kept[layer] if self.kept else written


@dataclass(frozen=True, slots=True)
class Reading:
    """A row of the batch that reads a part of a watched prompt."""

    request: Watched
    start: int
    end: int
    """Its tokens in the batch."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How one layer's block table differs from the scheduler's; the same from step to step while
    the batch is."""

    kept: list[int]
    """Per row, blocks before the gap."""
    gaps: list[int]
    """Per row, blocks in the gap."""
    places: Tensor
    """(rows, columns), which column of the scheduler's table each column is."""
    dropped: Tensor
    """(rows,), tokens in the gap; on the CPU, and on the table's device."""
    dropped_there: Tensor

    @classmethod
    def of(cls, kept: list[int], gaps: list[int], table: Tensor, block_size: int) -> Shape:
        """The shape of (rows, columns) `table` without its gaps."""
        first, gap = torch.tensor([kept, gaps])
        columns = torch.arange(table.shape[1])
        places = columns + torch.where(columns >= first[:, None], gap[:, None], 0)
        dropped = (gap * block_size).int()
        return cls(
            kept,
            gaps,
            places.clamp_(max=table.shape[1] - 1).to(table.device),
            dropped,
            dropped.to(table.device),
        )

    def apply(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The batch without the gaps."""
        upper = common.seq_lens_cpu_upper_bound - self.dropped
        return common.replace(
            block_table_tensor=common.block_table_tensor.gather(1, self.places),
            seq_lens=common.seq_lens - self.dropped_there,
            seq_lens_cpu_upper_bound=upper,
            max_seq_len=int(upper.max()),
            _num_computed_tokens_cache=None,
        )


class Worker:
    """Watched requests, and the layers they run through."""

    def __init__(self, method: CompressionMethod, layers: Sequence[Any], block_size: int) -> None:
        self.method = method
        self._layers = layers
        self._block_size = block_size
        self._pages: list[Pages] = []
        self._requests: dict[str, Watched] = {}
        self._by_block: dict[int, Watched] = {}
        self._rows: list[Watched | None] = []
        self._reading: list[Reading] = []
        self._shapes: list[Shape | None] = [None for _ in layers]

    def bind_caches(self) -> None:
        """Learn how the layers store tokens; their caches exist now."""
        self._pages = [Pages.of(layer, self._block_size) for layer in self._layers]

    def begin(self, step: Step) -> None:
        """Take in what changed, before blocks of departed requests are written to."""
        self._reading = []
        for name in step.preempted:
            self._preempt(name)
        for name in step.finished:
            self._forget(name)
        for request in step.started:
            self._forget(request.name)
            if self.method.fits(request.prompt_length):
                continue
            plan = BlockPlan.of(self.method, request.prompt_length, self._block_size)
            if plan.tail_block > 0:
                watched = Watched(request.name, plan, request.first_block)
                self._requests[request.name] = self._by_block[request.first_block] = watched
        for resumed in step.restored:
            self._restore(self._requests[resumed.name], resumed.blocks)

    def shortened(self, layer: int, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """A batch as one layer sees it: compressed rows without their gap, shorter by it. The first
        layer is asked first: it knows the rows."""
        table = common.block_table_tensor
        if layer == 0:
            self._rows = [self._by_block.get(block) for block in table[:, 0].tolist()]
            self._note(self._rows, common)
        rows = self._rows
        if not any(rows):
            return common
        kept = [row.kept[layer] if row and row.kept else 0 for row in rows]
        if any(kept):
            gaps = [
                row.plan.tail_block - kept[number] if row and row.kept else 0
                for number, row in enumerate(rows)
            ]
            found = self._shapes[layer]
            if found is None or found.kept != kept or found.gaps != gaps:
                found = self._shapes[layer] = Shape.of(kept, gaps, table, self._block_size)
            common = found.apply(common)
            table = common.block_table_tensor
        for number, row in enumerate(rows):
            if row is not None:
                row.blocks[layer] = table[number]
        return common

    def see(self, layer: int, queries: Tensor) -> None:
        """Keep the last queries of the prompts that a step reads; (tokens, heads, head_dim)."""
        for reading in self._reading:
            tail = self.method.tail
            seen = queries[max(reading.start, reading.end - tail) : reading.end]
            before = reading.request.queries.get(layer)
            if before is not None and seen.shape[0] < tail:
                seen = torch.cat([before, seen])[-tail:]
            reading.request.queries[layer] = seen.clone()

    @torch.no_grad()
    def finish(self) -> dict[str, list[int]]:
        """Compress the prompts that the step has read to their end; blocks kept, by request."""
        done = [
            reading.request
            for reading in self._reading
            if reading.request.length == reading.request.plan.prompt_length
        ]
        for request in done:
            self._compress(request)
        return {request.name: request.kept for request in done}

    def _compress(self, request: Watched) -> None:
        selection = self.method.start(len(self._layers))
        plan = request.plan
        blocks = [
            request.blocks[layer][: request.held_blocks(layer)].long()
            for layer in range(len(self._layers))
        ]
        for layer, pages in enumerate(self._pages):
            selection.observe(
                LayerObservation(
                    queries=request.queries[layer].transpose(0, 1),
                    keys=pages.keys(blocks[layer], plan.prompt_length),
                    scaling=self._layers[layer].impl.scale,
                )
            )
        kept = []
        for layer, pages in enumerate(self._pages):
            positions = kept_before_tail(selection, layer, plan)
            kept.append(positions.shape[1] // plan.block_size)
            if kept[-1] < plan.tail_block:
                pages.pack(blocks[layer], positions)
            request.blocks[layer] = torch.cat(
                [blocks[layer][: kept[-1]], blocks[layer][plan.tail_block :]]
            )
        request.kept = kept
        request.queries = {}
        tokens = plan.prompt_length - plan.tail_start + sum(kept) * plan.block_size / len(kept)
        logger.info(
            "%s: request %s keeps %.0f of %d prompt tokens per layer and head",
            self.method.name,
            request.name,
            tokens,
            plan.prompt_length,
        )

    def _note(self, rows: Sequence[Watched | None], common: CommonAttentionMetadata) -> None:
        """Remember which rows read a part of a watched prompt, and how long all are."""
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        for number, request in enumerate(rows):
            if request is not None:
                request.length = lengths[number]
                if not request.kept:
                    self._reading.append(Reading(request, starts[number], starts[number + 1]))

    def _forget(self, name: str) -> None:
        request = self._requests.pop(name, None)
        if request is not None:
            self._by_block.pop(request.first_block, None)

    def _preempt(self, name: str) -> None:
        """Save what a compressed request holds; one that is still reading will read again."""
        request = self._requests.get(name)
        if request is None:
            return
        if not request.kept:
            self._forget(name)
            return
        request.saved = [
            pages.cache[request.blocks[layer][: request.held_blocks(layer)].long()]
            for layer, pages in enumerate(self._pages)
        ]
        self._by_block.pop(request.first_block)
        request.first_block = -1

    def _restore(self, request: Watched, table: Sequence[list[int]]) -> None:
        for layer, pages in enumerate(self._pages):
            row = table[layer]
            held = row[: request.kept[layer]] + row[request.plan.tail_block :]
            blocks = torch.tensor(held[: request.held_blocks(layer)], device=pages.cache.device)
            pages.cache[blocks] = request.saved[layer]
        request.saved = []
        request.first_block = table[0][0]
        self._by_block[request.first_block] = request
