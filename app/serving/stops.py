"""Stop signals: one for each piece of work of a session while it waits or runs."""

from __future__ import annotations

import threading

MOST = 256


class Stops:
    """Events by session and kind of work."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], threading.Event] = {}

    def begin(self, session: str, kind: str = "") -> threading.Event:
        """A new signal, for work that starts now."""
        while len(self._events) >= MOST:  # begun, but left before their turn came
            self._events.pop(next(iter(self._events)))
        event = self._events[session, kind] = threading.Event()
        return event

    def begun(self, session: str, kind: str = "") -> threading.Event:
        """The signal of work that has begun already, else a new one."""
        return self._events.get((session, kind)) or self.begin(session, kind)

    def end(self, event: threading.Event) -> None:
        """Forget a signal, unless a newer one has taken its place already."""
        for key, held in list(self._events.items()):
            if held is event:
                del self._events[key]

    def on(self, session: str) -> bool:
        """Whether any work of a session is on."""
        return any(who == session for who, _ in list(self._events))

    def ask(self, session: str) -> bool:
        """Ask all work of a session to end; whether there is any."""
        asked = [event for (who, _), event in list(self._events.items()) if who == session]
        for event in asked:
            event.set()
        return bool(asked)
