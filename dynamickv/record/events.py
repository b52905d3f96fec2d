"""What `compare_stream` yields while it works: plain data, in the order things happen."""

from __future__ import annotations

from dataclasses import dataclass

from dynamickv.record.packed import Retained
from dynamickv.record.trace import ModelInfo, Prompt, Run, Trace


@dataclass(frozen=True, slots=True)
class Progress:
    """`completed` of `total` units of a stage; "prefill" counts layers."""

    stage: str
    completed: int
    total: int


@dataclass(frozen=True, slots=True)
class PromptEncoded:
    """The prompt is tokenized and will be read; the question is part of it, read or not."""

    model: ModelInfo
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class LayerKept:
    """What a method holds of a layer that was read. A method that shares its budget again cuts
    earlier layers: then each of them is told anew, and the last word on a layer holds."""

    run: int
    method: str
    layer: int
    """Its place in the model."""
    budget: int
    """Prompt tokens held per head, window included; the mean over heads where they differ."""
    retained: Retained
    """Of this layer alone: heads x prompt positions. What is fed after the compression is kept."""
    kv_bytes: int
    """Bytes that the keys and values held of this layer take."""
    kv_bytes_full: int
    """The same for the whole prompt."""


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


Event = Progress | PromptEncoded | LayerKept | Compressed | Token | RunFinished | ComparisonFinished
