"""Decode several compressed caches in one forward pass: the weights are read once for all of them.

Every run keeps its own cache and its own position; only the projections are shared. Logits may
differ in their last bits from those of a run decoded alone, as in any batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from dynamickv.cache import BatchedCache, KVCache, rows_bytes
from dynamickv.decoding.decode import choose_rows, feed_rows, feeder
from dynamickv.decoding.decode_step import RowSteps
from dynamickv.memory import free_on
from dynamickv.models import LoadedModel
from dynamickv.neighbours import Neighbours
from dynamickv.reading.observe import MASKED_BACKENDS


class Together:
    """Runs that advance in step. Each announces its token; the first to need an answer runs all."""

    PADDED = 8
    """How many times as long as the shortest cache of a group the longest may be."""

    def __init__(self, llm: LoadedModel) -> None:
        self._llm = llm
        steps = feeder(llm, plain=True)
        self._steps = steps if isinstance(steps, RowSteps) else None
        self._masked = llm.attention in MASKED_BACKENDS
        self._neighbours = Neighbours(llm.device)
        self._members: list[Member] = []
        self._batch: BatchedCache | None = None
        self._rows: list[Member] = []
        """Of the batch, from its first pass to its end: an answer that is over is fed on."""

    @property
    def size(self) -> int:
        """Runs that joined."""
        return len(self._members)

    def takes(self, cache: KVCache) -> bool:
        """Whether a run with this cache may join."""
        if self._steps is not None:
            return cache.plain
        return cache.joinable and (self._masked or not self._llm.geometry.joint)

    def join(self, cache: KVCache, position: int) -> Member:
        """Take in a run whose next token goes to `position`, the same for all."""
        member = Member(self._run, cache, position)
        self._members.append(member)
        return member

    def end(self) -> None:
        """None of the runs goes on."""
        self._neighbours.rest()

    def _run(self) -> None:
        """Feed every announced token."""
        waiting = [member for member in self._members if member.token_id is not None]
        with self._neighbours.step():
            start = time.perf_counter()
            chosen = self._chosen(waiting)
            seconds = time.perf_counter() - start
        for member, (token_id, logprob) in zip(waiting, chosen, strict=True):
            member.arrived = (token_id, logprob, seconds)
            member.position += 1
            member.token_id = None

    @torch.inference_mode()
    def _chosen(self, waiting: list[Member]) -> list[tuple[int, float]]:
        """Tokens after those that were announced, and their log probabilities."""
        if self._steps is not None:
            logits = self._steps(
                [member.cache for member in waiting if member.cache is not None],
                [member.token_id for member in waiting if member.token_id is not None],
                [member.position for member in waiting],
            )
            return choose_rows(logits)
        if self._batch is None:
            caches = [member.cache for member in waiting if member.cache is not None]
            self._batch = BatchedCache(caches, self._padded(caches))
            self._rows = [waiting[row] for row in self._batch.order]
        logits = feed_rows(
            self._llm,
            self._batch,
            [member.token_id or 0 for member in self._rows],
            [waiting[0].position] * len(self._rows),
        )
        # Picked here: on the device it would be one more wait.
        chosen = choose_rows(logits)
        return [chosen[self._rows.index(member)] for member in waiting]

    def _padded(self, caches: list[KVCache]) -> float:
        """What `BatchedCache` takes: attention apart where the copy in rows would not fit."""
        # Keys that a model makes anew from latents are made of all rows at once.
        if self._llm.geometry.joint:
            return math.inf
        fits = rows_bytes(caches) < free_on(self._llm.device)
        return self.PADDED if self._masked and fits else 0


class Member:
    """One run of a `Together`."""

    def __init__(self, run: Callable[[], None], cache: KVCache, position: int) -> None:
        self._run = run
        self.cache: KVCache | None = cache
        self.position = position
        self.token_id: int | None = None
        """Announced and not fed yet."""
        self.arrived: tuple[int, float, float] | None = None

    def leave(self) -> None:
        """This run is over; its cache is freed."""
        self.cache, self.token_id = None, None

    def announce(self, token_id: int) -> None:
        """The token this run feeds next; not announced when its answer has ended."""
        self.token_id = token_id

    def advance(self, token_id: int) -> tuple[int, float, float]:
        """(next token, its log probability, seconds of the shared pass)."""
        if self.arrived is None:
            self.token_id = token_id
            self._run()
        arrived, self.arrived = self.arrived, None
        assert arrived is not None
        return arrived
