"""Who may use the model next: one at a time, in a fair order, with a place and an estimate for
everyone who waits.

Knows nothing of models, pages or texts: a session is a string, work is a duration.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType

MOST = 64
"""Waiting and running together."""
PER_ADDRESS = 40
"""Of one network address: a classroom shares one."""
PER_SESSION = 16
"""Of one browser tab or API client."""
STALE = 30.0
"""Seconds after which a ticket that nobody asks about has left the queue."""
REMEMBERED = 8
"""Finished turns that an estimate looks back on."""
LEFT = 1024
"""Sessions that are known to have left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where someone stands."""

    ahead: int
    """Turns before this one, the running one included."""
    seconds: float | None
    """About how long until it begins; None while there is nothing to judge by."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One piece of work in the queue; leave with `with`."""

    turns: Turns
    session: str
    address: str
    round: int
    """How many of the same session were in the queue before: later rounds wait for earlier ones."""
    number: int
    stop: threading.Event
    """Set when the work is to end: Stop was pressed, or its client is gone."""
    expected: float | None = None
    """Seconds its work will take, if known."""
    asked: float = field(default_factory=time.monotonic)
    began: float | None = None

    def wait(self, seconds: float) -> bool:
        """Whether it is this ticket's turn, within that time."""
        return self.turns.wait(self, seconds)

    def place(self) -> Place:
        """Where it stands now."""
        return self.turns.place(self)

    def places(self, seconds: float) -> Iterator[Place]:
        """Where it stands, every so many seconds until it is its turn.

        Raises:
            ValueError: it was stopped meanwhile, or has left the queue.
        """
        while not self.wait(seconds):
            if self.stop.is_set():
                raise ValueError("Stopped while waiting: nothing was run.")
            yield self.place()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.turns.leave(self)


class Turns:
    """One lock with a fair queue: every session's first request goes before any session's second,
    and within a round who came first goes first.
    """

    def __init__(
        self, most: int = MOST, per_address: int = PER_ADDRESS, per_session: int = PER_SESSION
    ) -> None:
        self.most, self.per_address, self.per_session = most, per_address, per_session
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._running: Ticket | None = None
        self._numbers = count()
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        self._left: deque[str] = deque(maxlen=LEFT)

    def join(
        self,
        session: str,
        address: str = "",
        *,
        stop: threading.Event | None = None,
        expected: float | None = None,
    ) -> Ticket:
        """Stand in line.

        Raises:
            ValueError: the queue, the address or the session has as many as it may have.
        """
        with self._changed:
            self._forget_stale()
            held = [*self._waiting, *([self._running] if self._running else [])]
            mine = sum(ticket.session == session for ticket in held)
            if mine >= self.per_session:
                raise ValueError(
                    f"You have {mine} runs waiting, the most that one session may have: "
                    "wait for one to finish."
                )
            if sum(ticket.address == address for ticket in held) >= self.per_address:
                raise ValueError(
                    f"Your network has {self.per_address} runs waiting, the most that it may "
                    "have: try again in a minute."
                )
            if len(held) >= self.most:
                raise ValueError(
                    f"{len(held)} runs are waiting already: try again in a few minutes."
                )
            ticket = Ticket(
                turns=self,
                session=session,
                address=address,
                round=mine,
                number=next(self._numbers),
                stop=stop or threading.Event(),
                expected=expected,
            )
            if session in self._left:
                ticket.stop.set()
            self._waiting.append(ticket)
            self._waiting.sort(key=lambda t: (t.round, t.number))
            return ticket

    def wait(self, ticket: Ticket, seconds: float) -> bool:
        """Whether it is that ticket's turn within that time; then it is the running one.

        Raises:
            ValueError: it has left the queue.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                now = ticket.asked = time.monotonic()
                if self._running is ticket:
                    return True
                if ticket not in self._waiting:
                    raise ValueError("This run has left the queue: press Run again.")
                self._forget_stale()
                if self._running is None and self._waiting[0] is ticket:
                    self._waiting.pop(0)
                    self._running, ticket.began = ticket, now
                    return True
                if now >= end:
                    return False
                self._changed.wait(min(end - now, 1.0))

    def place(self, ticket: Ticket) -> Place:
        """Where a ticket stands."""
        with self._changed:
            if ticket not in self._waiting:
                return Place(ahead=0, seconds=0.0)
            before = self._waiting[: self._waiting.index(ticket)]
            running = [self._running] if self._running else []
            lengths = [self._expected(other) for other in (*running, *before)]
            known = [length for length in lengths if length is not None]
            return Place(
                ahead=len(lengths), seconds=sum(known) if len(known) == len(lengths) else None
            )

    def leave(self, ticket: Ticket) -> None:
        """Make room for the next."""
        with self._changed:
            if self._running is ticket:
                self._running = None
                if ticket.began is not None and not ticket.stop.is_set():
                    self._took.append(time.monotonic() - ticket.began)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            self._changed.notify_all()

    def stop(self, session: str) -> None:
        """Ask everything of that session to end."""
        with self._changed:
            for ticket in (*self._waiting, *([self._running] if self._running else [])):
                if ticket.session == session:
                    ticket.stop.set()
            self._changed.notify_all()

    def left(self, session: str) -> None:
        """Its client is gone: end everything of it, also what was sent before and joins after."""
        with self._changed:
            if session not in self._left:
                self._left.append(session)
        self.stop(session)

    def back(self, session: str) -> None:
        """Its client is there: it sends work."""
        with self._changed:
            if session in self._left:
                self._left.remove(session)

    def counts(self) -> dict[str, int]:
        """How many run and wait."""
        with self._changed:
            self._forget_stale()
            return {"running": int(self._running is not None), "waiting": len(self._waiting)}

    def _expected(self, ticket: Ticket) -> float | None:
        """Seconds that a ticket still needs."""
        length = ticket.expected
        if length is None and self._took:
            length = sum(self._took) / len(self._took)
        if length is None or ticket.began is None:
            return length
        return max(length - (time.monotonic() - ticket.began), 0.0)

    def _forget_stale(self) -> None:
        now = time.monotonic()
        self._waiting = [ticket for ticket in self._waiting if now - ticket.asked < STALE]
