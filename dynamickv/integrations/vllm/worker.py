"""What happens to requests in the process that runs the model: prompts are watched while they are
read, copied in compressed form after their last chunk, and from then on found in fewer blocks.

A row of a batch is known by the block of its last token in the first compressed layer: the request
took that block for itself, and it is freed no earlier than the request. Others that find it in the
prefix cache are not known by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynamickv.integrations.vllm.blocks import BlockPlan, dealt, kept_before_tail
from dynamickv.integrations.vllm.compat import CommonAttentionMetadata, init_logger
from dynamickv.integrations.vllm.pages import Pages
from dynamickv.integrations.vllm.ranks import Ranks
from dynamickv.integrations.vllm.shapes import Shape
from dynamickv.integrations.vllm.sliding import Sliding
from dynamickv.integrations.vllm.steps import Resumed, Step
from dynamickv.methods import CompressionMethod

logger = init_logger("vllm.dynamickv")


@dataclass
class Watched:
    """A request whose prompt does not fit its budget."""

    name: str
    plan: BlockPlan
    own: set[int] = field(default_factory=set)
    """Its blocks in the first compressed layer, but for those it found in the prefix cache."""
    room: list[int] = field(default_factory=list)
    """Blocks for the compressed copy, set aside by the scheduler."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the last queries read so far, (tail, num_query_heads, head_dim)."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the blocks of the last step, without the gap."""
    length: int = 0
    """Tokens read and written up to the last step, those dropped since included."""
    kept: list[int] = field(default_factory=list)
    """Per layer, blocks before the tail; empty until the prompt is compressed."""
    copies: list[Tensor | None] = field(default_factory=list)
    """Per layer, those blocks, where they are others than the scheduler's first ones."""
    saved: list[Tensor] = field(default_factory=list)
    """Per layer, the contents of its blocks while it is preempted."""
    windows: dict[str, Tensor] = field(default_factory=dict)
    """By sliding layer, its block table's row in the last step."""
    saved_windows: dict[str, Tensor] = field(default_factory=dict)
    """By sliding layer, the contents of its window's blocks while it is preempted."""

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


class Worker:
    """Watched requests, and the layers they run through."""

    def __init__(
        self,
        method: CompressionMethod,
        layers: Sequence[Any],
        block_size: int,
        sliding: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            method: what compresses.
            layers: vLLM's attention modules that are compressed, in order.
            block_size: tokens in a block.
            sliding: the other layers' modules by name; they keep their window.
            ranks: this rank among those that share a layer's heads.
        """
        self.method = method
        self._layers = layers
        self._block_size = block_size
        self._sliding = Sliding(sliding or {}, block_size)
        self._ranks = ranks or Ranks()
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
        for started in step.started:
            self._forget(started.name)
            plan = BlockPlan.of(self.method, started.prompt_length, self._block_size)
            self._requests[started.name] = Watched(started.name, plan)
            self._grow(started.name, started.blocks)
        for resumed in step.resumed:
            self._resume(resumed)
        for name, blocks in step.grown.items():
            self._grow(name, blocks)
        for name, room in step.rooms.items():
            self._requests[name].room = room

    def shortened(self, layer: int, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """A batch as one layer sees it: compressed rows without their gap, shorter by it. The first
        layer is asked first: it knows the rows."""
        table = common.block_table_tensor
        if layer == 0:
            last = (common.seq_lens_cpu_upper_bound.long() - 1).clamp_(min=0) // self._block_size
            blocks = table.gather(1, last.to(table.device)[:, None])[:, 0]
            self._rows = [self._by_block.get(block) for block in blocks.tolist()]
            self._note(self._rows, common)
        rows = self._rows
        if not any(rows):
            return common
        copies = [row.copies[layer] if row and row.kept else None for row in rows]
        gaps = [row.plan.tail_block - row.kept[layer] if row and row.kept else 0 for row in rows]
        if any(gaps):
            found = self._shapes[layer]
            if found is None or not found.fits(copies, gaps, table):
                found = self._shapes[layer] = Shape.of(copies, gaps, table, self._block_size)
            common = found.apply(common)
            table = common.block_table_tensor
        for number, row in enumerate(rows):
            if row is not None:
                row.blocks[layer] = table[number]
        return common

    def beside(self, layer: str, common: CommonAttentionMetadata) -> None:
        """A batch as a sliding layer sees it, which is as the scheduler says."""
        self._sliding.tables[layer] = common.block_table_tensor

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
        for number, row in enumerate(self._rows):
            if row is not None:
                row.windows = self._sliding.rows(number)
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
                self._ranks.observation(
                    self.method,
                    queries=request.queries[layer].transpose(0, 1),
                    keys=pages.keys(blocks[layer], plan.prompt_length),
                    scaling=self._layers[layer].impl.scale,
                )
            )
        positions = [
            self._ranks.own(self.method, kept_before_tail(selection, layer, plan))
            for layer in range(len(self._layers))
        ]
        request.kept = [chosen.shape[1] // plan.block_size for chosen in positions]
        request.copies = []
        for layer, share in enumerate(dealt(request.room, request.kept, plan.tail_block)):
            copy = torch.tensor(share, device=blocks[layer].device) if share else None
            if copy is not None:
                if layer == 0:
                    self._lose(request, blocks[0][: plan.tail_block].tolist())
                self._pages[layer].pack(blocks[layer], positions[layer], copy)
                request.blocks[layer] = torch.cat([copy, blocks[layer][plan.tail_block :]])
            request.copies.append(copy)
        request.queries, request.room = {}, []
        kept = sum(request.kept) * plan.block_size / len(request.kept)
        logger.info(
            "%s: request %s keeps %.0f of %d prompt tokens per layer and head",
            self.method.name,
            request.name,
            plan.prompt_length - plan.tail_start + kept,
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

    def _grow(self, name: str, blocks: Sequence[int]) -> None:
        """A request has new blocks in the first layer."""
        request = self._requests.get(name)
        if request is not None:
            request.own.update(blocks)
            self._by_block.update(dict.fromkeys(blocks, request))

    def _lose(self, request: Watched, blocks: Iterable[int]) -> None:
        """Some of a request's blocks are no longer its own."""
        for block in request.own.intersection(blocks):
            if self._by_block.get(block) is request:
                del self._by_block[block]
        request.own.difference_update(blocks)

    def _forget(self, name: str) -> None:
        request = self._requests.pop(name, None)
        if request is not None:
            self._lose(request, request.own)

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
        request.saved_windows = self._sliding.save(request.windows, request.length)
        self._lose(request, request.own)

    def _resume(self, resumed: Resumed) -> None:
        """Go on from a compressed prompt: put back what was saved, or find it where it lies."""
        request = self._requests.get(resumed.name)
        plan = BlockPlan.of(self.method, resumed.prompt_length, self._block_size)
        if request is None:
            request = self._requests[resumed.name] = Watched(resumed.name, plan)
            request.kept = resumed.kept
        for layer, contents in enumerate(request.saved):
            row = resumed.blocks[layer]
            held = row[: request.kept[layer]] + row[plan.tail_block :]
            blocks = torch.tensor(held[: request.held_blocks(layer)], device=contents.device)
            self._pages[layer].cache[blocks] = contents
        self._sliding.restore(request.saved_windows, resumed.windows, request.length)
        request.saved, request.saved_windows = [], {}
        request.copies = [
            torch.tensor(row[:kept], device=pages.cache.device)
            for row, kept, pages in zip(resumed.blocks, resumed.kept, self._pages, strict=True)
        ]
        row = resumed.blocks[0]
        self._grow(resumed.name, row[: resumed.kept[0]] + row[plan.tail_block :])
