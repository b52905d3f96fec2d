"""The run record: everything a comparison measured, as plain data that needs neither torch nor a
model to read.

A record is what the engine hands to anything that draws, saves or compares runs. It knows nothing
about models, caches or pages. Loading checks every type, size and range, because a record may come
from a stranger.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import statistics
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamickv.record.aligned import Aligned
from dynamickv.record.checks import (
    FINISH_REASONS,
    MAX_COUNT,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_RUNS,
    NAMES,
    check,
    read,
    show,
)
from dynamickv.record.expected import Expected
from dynamickv.record.kinds import KINDS
from dynamickv.record.packed import Retained, Scores

__all__ = [
    "FINISH_REASONS",
    "KINDS",
    "MAX_BYTES",
    "MAX_COUNT",
    "MAX_HEADS",
    "MAX_LAYERS",
    "MAX_POSITIONS",
    "MAX_RUNS",
    "NAMES",
    "SCHEMA",
    "Agreement",
    "Aligned",
    "Divergence",
    "Expected",
    "Forgotten",
    "ModelInfo",
    "Prompt",
    "Retained",
    "Run",
    "Scores",
    "Trace",
    "seconds_per_token",
]

SCHEMA = 2
"""What is written. Schema 1 is read too; see `Trace.lacks`."""
READ = (1, SCHEMA)
MAX_BYTES = 64 * 2**20
"""Largest record that is read, in bytes after decompression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Which model ran, in which geometry and number format."""

    name: str
    revision: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    device: str
    attention: str
    max_positions: int
    """Longest sequence the model reads, in tokens."""
    sliding_layers: list[int] = field(default_factory=list)
    """Layers that see only the last tokens, by their place; no method compresses them."""
    layer_kinds: list[str] = field(default_factory=list)
    """Every layer's kind, as in `record.kinds.KINDS`; empty in older records, whose other layers
    attend to the whole prompt."""
    precision: str = ""
    """ "exact" where products are the model's own, "fast" where a prompt's round as bfloat16 ones
    do; empty where it was not recorded."""

    @property
    def uncompressed(self) -> dict[int, str]:
        """Layers that no method compresses, by their place, and their kind."""
        if not self.layer_kinds:
            return dict.fromkeys(self.sliding_layers, "sliding")
        kinds = enumerate(self.layer_kinds)
        return {place: kind for place, kind in kinds if not KINDS[kind].compressed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The prompt (template, document and question) and where each token sits in its text."""

    length: int
    """Tokens."""
    text: str
    text_utf16_offsets: list[list[int]]
    """[start, end) of every token in `text`, in UTF-16 units; tokens that share a character
    overlap."""
    document_span: list[int]
    """[first, last) token that touches the document."""
    document_utf16_span: list[int]
    question_span: list[int]
    question: str
    question_aware: bool
    """Whether the question was in the prompt when the cache was compressed."""
    truncated: bool
    original_length: int
    """Tokens before the middle of the document was cut out; `length` when nothing was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first answer token in which a run leaves FullKV's answer, and how probable both tokens
    were there: the same words before it, two caches."""

    token_ids: list[int]
    """This run's token and FullKV's."""
    pieces: list[str]
    """Their text; empty where a token is only a part of a character or ends the answer."""
    probabilities: list[float]
    """Of these two tokens under this run's cache."""
    probabilities_full: list[float]
    """Of the same two under the full cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far an answer follows FullKV's answer in the same comparison."""

    first_divergence: int | None
    """Index of the first differing answer token; None when the answers are identical."""
    token_match: float
    """Share of positions, over the longer answer, that hold the same token."""
    rouge_l: float
    """ROUGE-L F-measure over words."""
    divergence: Divergence | None = None
    """What happened at `first_divergence`; None where one of the answers has no token there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """One choice that a method made anew while it answered."""

    position: int
    """Answer tokens that had been read by then; 0 where the question was still being read."""
    retained: Retained
    """What was kept of the prompt and of those answer tokens."""
    seconds: float


def seconds_per_token(decode_seconds: Sequence[float]) -> float | None:
    """Median of a run's decoding steps; the first token comes free with the prefill."""
    steps = decode_seconds[1:]
    return statistics.median(steps) if steps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One method's answer and what it kept to give it."""

    method: str
    parameters: dict[str, Any]
    answer: str
    token_ids: list[int]
    pieces: list[str]
    """Text of each answer token; their concatenation is `answer`."""
    logprobs: list[float]
    """Natural-log probability of each answer token under this run's cache."""
    finish_reason: str
    """"stop" (end of answer), "length" (max_new_tokens or the model's limit) or "cancelled"."""
    budgets: list[int]
    """Kept prompt tokens per layer and head, observation window included; the mean over heads where
    they differ. A sliding-window layer's is what it holds."""
    budget_history: list[list[int]]
    """DynamicKV: prefix budgets (window excluded) of the compressed layers seen so far, after each
    update."""
    retained: Retained
    scores: Scores | None = None
    kv_bytes: int
    """Bytes of the keys and values kept for the prompt, summed from the tensors."""
    kv_bytes_full: int
    """The same for the uncompressed prompt."""
    kept_fraction: float
    """kept positions / all positions, over compressed layers and heads."""
    score_seconds: float
    prune_seconds: float
    decode_seconds: list[float]
    """Per answer token; the first comes from the prefill's logits."""
    decoded_together: int = 1
    """Runs that shared each decoding pass; with more than one, its time is theirs together."""
    agreement: Agreement | None = None
    aligned: Aligned | None = None
    """FullKV's words under this run's cache; None for FullKV itself and where it is not there."""
    erased: int | None = None
    """Prompt positions that no layer and no head keeps; None where it was not recorded."""
    decoding: dict[str, int] | None = None
    """`budget` and `buffer`, where compression went on while answering."""
    forgotten: list[Forgotten] = field(default_factory=list)
    """The choices that were made then, in order."""
    expected_found: bool | None = None
    """Whether the answer holds what was expected; None where nothing was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A whole comparison: one prompt, one model, one prefill, any number of runs."""

    created: str
    versions: dict[str, str]
    model: ModelInfo
    prompt: Prompt
    prefill_seconds: float
    runs: list[Run] = field(default_factory=list)
    expected: Expected | None = None
    """What a person expects in the answers, if they said so."""
    schema: int = SCHEMA

    @property
    def lacks(self) -> list[str]:
        """What records of today hold and this older one does not, in words."""
        if self.schema >= SCHEMA:
            return []
        return [
            "each word's probability under both caches",
            "positions erased everywhere",
            "the precision of the model's products",
        ]

    def run(self, method: str) -> Run:
        """The first run of that method.

        Raises:
            ValueError: if the record holds no such run.
        """
        for run in self.runs:
            if run.method == method:
                return run
        held = ", ".join(run.method for run in self.runs) or "none"
        raise ValueError(f"this record holds no run of {method!r}; it holds {held}")

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Trace:
        """Check and read a record.

        Raises:
            ValueError: one sentence that names the field, its value and what was expected.
        """
        if not isinstance(data, dict):
            raise ValueError(
                f"a run record is a JSON object, got {type(data).__name__}; "
                "choose a file saved here"
            )
        if "schema" not in data:
            raise ValueError(
                "this file has no schema, so it is no run record; choose a file saved here"
            )
        if type(data["schema"]) is not int or data["schema"] not in READ:
            raise ValueError(
                f"this record has schema {show(data['schema'])}, and schemas "
                f"{' and '.join(map(str, READ))} are read here; open it with the version that "
                "wrote it"
            )
        trace: Trace = read(cls, data, "record")
        check(trace)
        return trace

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as .json, or compressed when the name ends in .gz; a crash leaves no
        half file."""
        target = Path(path)
        text = json.dumps(
            self.to_dict(), ensure_ascii=False, separators=(",", ":"), allow_nan=False
        )
        payload = text.encode("utf-8")
        if target.suffix == ".gz":
            payload = gzip.compress(payload, mtime=0)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a record file, compressed or not.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not a run record, or larger than `MAX_BYTES`.
        """
        with open(path, "rb") as file:
            return cls.from_bytes(file.read(MAX_BYTES + 1), Path(path).name)

    @classmethod
    def from_bytes(cls, payload: bytes, name: str = "the file") -> Trace:
        """Read a record from the content of a file, compressed or not; errors as in `load`."""
        try:
            if payload[:2] == b"\x1f\x8b":
                payload = zlib.decompressobj(wbits=31).decompress(payload, MAX_BYTES + 1)
            data = json.loads(payload.decode("utf-8")) if len(payload) <= MAX_BYTES else None
        except (zlib.error, ValueError, RecursionError):
            raise ValueError(f"{name} is not a run record; choose a file saved here") from None
        if len(payload) > MAX_BYTES:
            raise ValueError(
                f"{name} is larger than {MAX_BYTES // 2**20} MiB, the most a run record holds; "
                "choose a smaller file"
            )
        return cls.from_dict(data)
