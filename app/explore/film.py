"""The film of a run that is going on: engine events in, and what the browser lacks of them out.

A page may miss a picture when it has much to draw, so that every row is sent in several of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dynamickv as dkv
from app.record.payload import trace_payload
from app.views import VIEWS
from dynamickv.record.trace import Run, Trace

AGAIN = 4
"""Pictures that each row is part of."""
SHOW_EVERY = 0.25
"""Seconds between two pictures."""
Row = list[Any]
"""[run, layer, budget, kv_bytes, kv_bytes_full, base64 of the bits, empty where all is kept]"""


class Film:
    """Accumulates what the layers keep, and says what changed lately."""

    def __init__(self, methods: Sequence[dkv.CompressionMethod]) -> None:
        self._methods = methods
        self._opening: dict[str, Any] | None = None
        self._length = 0
        self._rows: dict[tuple[int, int], tuple[int, Row]] = {}
        """By run and layer: the picture in which the row is new, and the row."""
        self._picture = 0
        self._last = 0
        """The last picture that has anything to say."""
        self._shown_at = float("-inf")
        self._read = False
        self._layers = 0
        """Layers that are read, of those that are compressed; what is kept may be told later."""

    def add(self, event: dkv.Event) -> bool:
        """Take one event in; True where it ought to be seen at once."""
        if isinstance(event, dkv.PromptEncoded):
            self._opening = opening(event, self._methods)
            self._length = event.prompt.length
            self._last = self._picture + AGAIN
            return True
        if isinstance(event, dkv.LayerKept):
            whole = event.budget >= self._length
            bits = "" if whole else event.retained.bits
            row = [event.run, event.layer, event.budget, event.kv_bytes, event.kv_bytes_full, bits]
            self._rows[event.run, event.layer] = (self._picture, row)
            self._last = self._picture + AGAIN
            return False
        if isinstance(event, dkv.Progress) and event.stage == "prefill":
            self._layers = event.completed
            self._last = self._picture + AGAIN
            return event.completed == 1
        if isinstance(event, dkv.Compressed) and not self._read:
            self._read = True
            self._last = self._picture + AGAIN
            return True
        return False

    def picture(self, now: float, at_once: bool = False) -> dict[str, Any] | None:
        """What to send at a time, in seconds; None where there is nothing or it is too early."""
        if self._opening is None or self._picture >= self._last:
            return None
        if not at_once and now - self._shown_at < SHOW_EVERY:
            return None
        self._shown_at = now
        number = self._picture
        self._picture += 1
        film: dict[str, Any] = {
            "number": number,
            "read": self._read,
            "layers": self._layers,
            "rows": [row for new, row in self._rows.values() if new > number - AGAIN],
        }
        if number < AGAIN:
            film["opening"] = self._opening
        return {"film": film}


def opening(event: dkv.PromptEncoded, methods: Sequence[dkv.CompressionMethod]) -> dict[str, Any]:
    """The record before anything is read: every layer still holds the whole prompt."""
    length, model = event.prompt.length, event.model
    runs = [
        Run(
            method=method.name,
            parameters=method.parameters,
            answer="",
            token_ids=[],
            pieces=[],
            logprobs=[],
            finish_reason="cancelled",
            budgets=[length] * model.num_layers,
            budget_history=[],
            retained=dkv.Retained(heads=model.num_kv_heads, bits=""),
            kv_bytes=0,
            kv_bytes_full=0,
            kept_fraction=1.0,
            score_seconds=0.0,
            prune_seconds=0.0,
            decode_seconds=[],
        )
        for method in methods
    ]
    trace = Trace(
        created="",
        versions={},
        model=model,
        prompt=event.prompt,
        prefill_seconds=0.0,
        runs=runs,
    )
    figures = {"budgets": VIEWS["budgets"].render(trace).to_json()}
    payload = trace_payload(trace, "running now", figures)
    for run in payload["record"]["runs"]:
        run["retained"]["bits"] = ""
    return payload
