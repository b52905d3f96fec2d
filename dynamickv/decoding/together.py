"""Decode several compressed caches in one forward pass: the weights are read once for all of them.

Every run keeps its own cache and its own position; only the projections are shared. Logits may
differ in their last bits from those of a run decoded alone, as in any batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dynamickv.cache import KVCache
from dynamickv.decoding.decode import choose, feeder
from dynamickv.models import LoadedModel


class Together:
    """Runs that advance in step. Each announces its token; the first to need an answer runs all."""

    def __init__(self, llm: LoadedModel) -> None:
        self._feed = feeder(llm, plain=True)
        self._members: list[Member] = []

    @property
    def size(self) -> int:
        """Runs that joined."""
        return len(self._members)

    def join(self, cache: KVCache, position: int) -> Member:
        """Take in a run whose next token goes to `position`; its cache is `plain`."""
        member = Member(self._run, cache, position)
        self._members.append(member)
        return member

    def _run(self) -> None:
        """Feed every announced token."""
        waiting = [member for member in self._members if member.token_id is not None]
        start = time.perf_counter()
        logits = self._feed(
            [member.cache for member in waiting if member.cache is not None],
            [member.token_id for member in waiting if member.token_id is not None],
            [member.position for member in waiting],
        )
        chosen = [choose(row) for row in logits]
        seconds = time.perf_counter() - start
        for member, (token_id, logprob) in zip(waiting, chosen, strict=True):
            member.arrived = (token_id, logprob, seconds)
            member.position += 1
            member.token_id = None


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
