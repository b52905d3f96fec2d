"""Prefills kept for another question, bounded in bytes; the longest unused goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from dynamickv.records import Prefill


class PrefillStore:
    """A thread-safe store that never holds more than `max_bytes` of tensors."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self._held: OrderedDict[Hashable, Prefill] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        with self._lock:
            return self._nbytes()

    def get(self, key: Hashable) -> Prefill | None:
        """The prefill kept under that key, now the most recently used, or None."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: Hashable, prefill: Prefill) -> bool:
        """Keep a prefill, dropping the longest unused; False if it is larger than the store."""
        with self._lock:
            self._held.pop(key, None)
            if prefill.nbytes > self.max_bytes:
                return False
            self._held[key] = prefill
            while self._nbytes() > self.max_bytes:
                self._held.popitem(last=False)
            return True

    def drop(self, key: Hashable) -> None:
        """Forget one prefill, if it is held."""
        with self._lock:
            self._held.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()

    def _nbytes(self) -> int:
        return sum(prefill.nbytes for prefill in self._held.values())
