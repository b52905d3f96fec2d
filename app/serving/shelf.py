"""What runs leave behind for the questions that follow: the record, and the prefill it came from.

Everything lies under a key that nobody can guess and only the page that ran it knows, so that one
visitor never reaches another's text. Bounded in bytes; the longest unused goes first.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass

import dynamickv as dkv

PREFILL_BYTES = 2 * 2**30
TRACE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One comparison that can be gone on from."""

    trace: dkv.Trace
    model: str
    kind: str
    """Where it comes from: "run", "recorded" or "file"."""
    prefill: dkv.Prefill | None
    """None when it came from a file, or when the prefill had to make room."""


class Shelf:
    """Records and prefills by key."""

    def __init__(self, prefill_bytes: int = PREFILL_BYTES, trace_bytes: int = TRACE_BYTES) -> None:
        self._prefills = dkv.PrefillStore(prefill_bytes)
        self._traces: OrderedDict[str, tuple[dkv.Trace, str, str]] = OrderedDict()
        self._trace_bytes = trace_bytes
        self._lock = threading.Lock()

    def put(
        self,
        trace: dkv.Trace,
        kind: str,
        model: str = "",
        prefill: dkv.Prefill | None = None,
    ) -> str:
        """Keep a comparison; its key."""
        key = secrets.token_urlsafe(24)
        if prefill is not None:
            self._prefills.put(key, prefill)
        with self._lock:
            self._traces[key] = (trace, model, kind)
            self._make_room()
        return key

    def replace(self, key: str, trace: dkv.Trace) -> None:
        """Another record for the same prompt, such as one with a run more."""
        with self._lock:
            if key in self._traces:
                self._traces[key] = (trace, *self._traces[key][1:])
                self._make_room()

    def get(self, key: object) -> Held | None:
        """What lies under that key, now the most recently used, or None."""
        if not isinstance(key, str):
            return None
        with self._lock:
            found = self._traces.get(key)
            if found is None:
                return None
            self._traces.move_to_end(key)
        trace, model, kind = found
        return Held(trace=trace, model=model, kind=kind, prefill=self._prefills.get(key))

    def _make_room(self) -> None:
        while len(self._traces) > 1 and self._size() > self._trace_bytes:
            key, _ = self._traces.popitem(last=False)
            self._prefills.drop(key)

    def _size(self) -> int:
        return sum(trace_bytes(trace) for trace, *_ in self._traces.values())


def trace_bytes(trace: dkv.Trace) -> int:
    """About how much memory a record takes: its texts, bits and offsets."""
    runs = sum(
        len(run.retained.bits) + len(run.scores.bytes if run.scores else "") for run in trace.runs
    )
    return runs + 4 * len(trace.prompt.text) + 160 * trace.prompt.length
