"""The scheduler's half of the plugin: which requests are compressed, what they keep, and which go
on from a compressed prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dynamickv.integrations.vllm.blocks import BlockPlan, dealt, room_for
from dynamickv.integrations.vllm.cache_layout import Awaited, CompressedManager, Gap
from dynamickv.integrations.vllm.chains import Chain, Chains
from dynamickv.integrations.vllm.compat import Request, RequestStatus, SchedulerOutput
from dynamickv.integrations.vllm.steps import Kept, Resumed, Started, Step
from dynamickv.methods import CompressionMethod


class Scheduling:
    """What the scheduler knows of requests that are, or will be, compressed."""

    def __init__(
        self,
        method: CompressionMethod,
        groups: list[int],
        sliding: dict[str, int],
        block_size: int,
        conversations: bool,
    ) -> None:
        """
        Args:
            method: what compresses.
            groups: numbers of the compressed layers' cache groups.
            sliding: the sliding layers' by their names.
            block_size: tokens in a block.
            conversations: whether compressed prompts are left for a later turn.
        """
        self.method = method
        self.groups = groups
        self.sliding = sliding
        self.chains = Chains(block_size)
        self.managers: list[CompressedManager] = []
        self._block_size = block_size
        self._conversations = conversations
        self._plans: dict[str, BlockPlan] = {}
        """By request, of its prompt or of the one that it goes on from."""
        self._kept: dict[str, list[int]] = {}
        """By request that is compressed, per layer: blocks before the tail."""
        self._found: dict[str, Chain] = {}
        """Chains that requests may take over once blocks for them are found."""
        self._went_on: dict[str, int] = {}
        """Tokens that a chain had processed, by the request that took it over."""
        self._resuming: set[str] = set()
        self._written: dict[str, int] = {}
        """Tokens that the steps so far have written."""

    def require_room(self, blocks: int, longest: int) -> None:
        """Raise ValueError where the longest prompt and its compressed copy do not fit into the
        pool: such a prompt would wait forever."""
        layers = len(self.managers)
        plan = BlockPlan.of(self.method, longest, self._block_size)
        room = 0 if self.method.fits(longest) else room_for(self.method, plan, layers)
        if layers * -(-longest // self._block_size) + room > blocks:
            fits = (blocks - room) // layers * self._block_size
            raise ValueError(
                f"{blocks} blocks do not hold a prompt of --max-model-len {longest} tokens and its "
                f"compressed copy; use --max-model-len {max(fits, 1)} or give the KV cache more "
                "memory"
            )

    def matched(self, request: Request, local: int) -> int:
        """Tokens beyond `local` ones in the prefix cache that a waiting request need not read: it
        goes on from its own compressed prompt, or from that of the turn before."""
        name = request.request_id
        compressed = name in self._kept and name not in self._found
        if compressed and self._written[name] > local:
            return self._written[name] - local
        self.forget(name)
        if not self._may_compress(request):
            return 0
        if self._conversations and request.status == RequestStatus.WAITING:
            chain = self.chains.find(request)
            if chain is not None and chain.length > local:
                self._propose(name, chain)
                return chain.length - local
        plan = BlockPlan.of(self.method, request.num_prompt_tokens, self._block_size)
        if plan.tail_block > 0 and not self.method.fits(request.num_prompt_tokens):
            self._plans[name] = plan
            for number, manager in enumerate(self.managers):
                room = 0 if number else room_for(self.method, plan, len(self.managers))
                manager.await_prompt(name, Awaited(plan.prompt_length, room))
        return 0

    def _may_compress(self, request: Request) -> bool:
        """Prompts whose tokens all give an output, that grow, that have no token ids, or that are
        read again together with a part of the answer, stay whole."""
        return not (
            request.skip_reading_prefix_cache
            or request.resumable
            or request.prompt_token_ids is None
            or request.num_tokens > request.num_prompt_tokens
        )

    def _propose(self, name: str, chain: Chain) -> None:
        plan = BlockPlan.of(self.method, chain.prompt_length, self._block_size)
        self._plans[name] = plan
        self._kept[name] = chain.kept
        self._found[name] = chain
        for manager, blocks, row in zip(self.managers, chain.kept, chain.rows, strict=True):
            manager.resume(name, Gap(blocks, plan.tail_block), row)

    def allocated(self, name: str, external: int) -> None:
        """Blocks were found for a request."""
        if external > 0:
            self._resuming.add(name)
        chain = self._found.pop(name, None)
        if chain is not None:
            self.chains.drop(chain)
            self._went_on[name] = chain.length

    def step(self, output: SchedulerOutput) -> Step:
        """What changed since the step before."""
        again = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        for name in self._plans.keys() & computed.keys():
            self._written[name] = computed[name] + output.num_scheduled_tokens[name]
        begun = [(new.req_id, new.block_ids) for new in output.scheduled_new_reqs]
        grown = {}
        for name, blocks in zip(again.req_ids, again.new_block_ids, strict=True):
            if name in again.resumed_req_ids:
                begun.append((name, blocks))
            elif blocks is not None and name in self._plans:
                grown[name] = blocks[self.groups[0]]
        step = Step(
            preempted=frozenset(output.preempted_req_ids or ()),
            finished=frozenset(output.finished_req_ids),
            started=tuple(
                Started(
                    name,
                    self._plans[name].prompt_length,
                    blocks[self.groups[0]][computed[name] // self._block_size :],
                )
                for name, blocks in begun
                if name in self._plans and name not in self._resuming
            ),
            resumed=tuple(
                Resumed(
                    name,
                    self._plans[name].prompt_length,
                    self._kept[name],
                    [blocks[group] for group in self.groups],
                    {layer: blocks[group] for layer, group in self.sliding.items()},
                )
                for name, blocks in begun
                if name in self._resuming
            ),
            grown=grown,
            rooms=self._rooms(output.num_scheduled_tokens),
        )
        self._resuming.clear()
        return step

    def _rooms(self, scheduled: Iterable[str]) -> dict[str, list[int]]:
        rooms = {
            name: [block.block_id for block in self.managers[0].room(name)]
            for name in scheduled
            if name in self._plans and name not in self._kept
        }
        return {name: room for name, room in rooms.items() if room}

    def compressed(self, told: Kept) -> None:
        """Prompts were compressed: give back what they no longer need."""
        for name, kept in told.blocks.items():
            plan = self._plans.get(name)
            if plan is None:
                continue
            self._kept[name] = kept
            copies = dealt(self.managers[0].room(name), kept, plan.tail_block)
            self.managers[0].close_room(name, sum(map(len, copies)))
            for manager, copy in zip(self.managers, copies, strict=True):
                manager.settle(name, copy, plan.tail_block)

    def finished(self, request: Request) -> dict[str, Any]:
        """Forget a request, but for the chain that it leaves; what its response tells."""
        name = request.request_id
        plan, kept = self._plans.get(name), self._kept.get(name)
        went_on = self._went_on.get(name)
        answered = request.status in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
        )
        if plan is not None and kept is not None and name not in self._found:
            in_flight = request.num_in_flight_tokens > 0
            if answered and self._conversations and not in_flight:
                self._leave_chain(request, plan, kept)
        self.forget(name)
        length = request.num_prompt_tokens if plan is None else plan.prompt_length
        told = {
            "method": self.method.name,
            "prompt_tokens": length,
            "kept_tokens": [length] * len(self.groups),
        }
        if plan is not None and kept is not None:
            tail = length - plan.tail_start
            told["kept_tokens"] = [tail + blocks * self._block_size for blocks in kept]
        if went_on is not None:
            told["continued_tokens"] = went_on
        return told

    def _leave_chain(self, request: Request, plan: BlockPlan, kept: list[int]) -> None:
        name, length = request.request_id, request.num_computed_tokens
        held = -(-length // self._block_size)
        if any(len(manager.req_to_blocks.get(name, ())) < held for manager in self.managers):
            return
        rows = [manager.pop_blocks_for_free(name) for manager in self.managers]
        pool = self.managers[0].block_pool
        pool.free_blocks([block for row in rows for block in row[held:]])
        rows = [row[:held] for row in rows]
        chain = Chain(self.chains.key(request, length), length, plan.prompt_length, kept, rows)
        self.chains.keep(chain, pool)

    def forget(self, name: str) -> None:
        """Nothing is known of a request any longer."""
        for known in (self._plans, self._kept, self._found, self._went_on, self._written):
            known.pop(name, None)
        for manager in self.managers:
            manager.forget(name)
