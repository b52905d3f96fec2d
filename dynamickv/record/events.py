"""What `compare_stream` yields while it works: plain data, in the order things happen."""

from __future__ import annotations

from dataclasses import dataclass

from dynamickv.record.trace import Run, Trace


@dataclass(frozen=True, slots=True)
class Progress:
    """`completed` of `total` units of a stage; "prefill" counts layers."""

    stage: str
    completed: int
    total: int


@dataclass(frozen=True, slots=True)
class Compressed:
    """A method has chosen and its cache is pruned; decoding has not begun."""

    run: int
    method: str
    budgets: list[int]
    kept_fraction: float
    kv_bytes: int
    score_seconds: float
    prune_seconds: float


@dataclass(frozen=True, slots=True)
class Token:
    """One more answer token; `answer` is the text so far."""

    run: int
    method: str
    token_id: int
    answer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RunFinished:
    """A method's answer is complete."""

    run: int
    record: Run


@dataclass(frozen=True, slots=True)
class ComparisonFinished:
    """All runs are complete; the last event."""

    trace: Trace


Event = Progress | Compressed | Token | RunFinished | ComparisonFinished
