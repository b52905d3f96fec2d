"""The run record: everything a comparison measured, as plain data that needs neither torch nor a
model to read.

A record is what the engine hands to anything that draws, saves or compares runs. It knows nothing
about models, caches or pages. Loading checks every type, size and range, because a record may come
from a stranger.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import gzip
import json
import math
import os
import statistics
import tempfile
import types
import typing
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

SCHEMA = 1
MAX_BYTES = 64 * 2**20
"""Largest record that is read, in bytes after decompression."""
MAX_POSITIONS = 2**20
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_RUNS = 64
MAX_COUNT = 2**53
"""Largest count; JavaScript reads no larger whole number exactly."""
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
FINISH_REASONS = ("stop", "length", "cancelled")

Record = TypeVar("Record")


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
    """Every layer's kind ("full", "sliding", "linear" and so on); empty in older records, whose
    other layers attend to the whole prompt."""


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
class Retained:
    """Which prompt positions a run kept: one bit per layer, head and position."""

    heads: int
    bits: str
    """base64 of numpy.packbits (most significant bit first) over (layer, head, position) in C
    order."""

    @classmethod
    def pack(cls, mask: np.ndarray) -> Retained:
        """Pack a boolean (layers, heads, positions) array."""
        return cls(
            heads=int(mask.shape[1]),
            bits=base64.b64encode(np.packbits(mask.reshape(-1)).tobytes()).decode("ascii"),
        )

    def unpack(self, num_layers: int, length: int) -> np.ndarray:
        """Boolean (layers, heads, positions)."""
        size = num_layers * self.heads * length
        packed = np.frombuffer(_decode_base64(self.bits, "retained.bits"), np.uint8)
        if packed.size != math.ceil(size / 8):
            raise ValueError(
                f"retained.bits holds {packed.size} bytes where {num_layers} layers x {self.heads} "
                f"heads x {length} positions need {math.ceil(size / 8)}; save the run again"
            )
        return (
            np.unpackbits(packed, count=size).astype(bool).reshape(num_layers, self.heads, length)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Importance of every position, averaged over heads and scaled per layer to 0..255."""

    bytes: str
    """base64 of uint8 (layer, position) in C order."""

    @classmethod
    def pack(cls, scores: np.ndarray) -> Scores:
        """Pack a uint8 (layers, positions) array."""
        return cls(
            bytes=base64.b64encode(np.ascontiguousarray(scores, np.uint8).tobytes()).decode("ascii")
        )

    def unpack(self, num_layers: int, length: int) -> np.ndarray:
        """uint8 (layers, positions)."""
        raw = np.frombuffer(_decode_base64(self.bytes, "scores.bytes"), np.uint8)
        if raw.size != num_layers * length:
            raise ValueError(
                f"scores.bytes holds {raw.size} values where {num_layers} layers x {length} "
                f"positions need {num_layers * length}; save the run again"
            )
        return raw.reshape(num_layers, length)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A whole comparison: one prompt, one model, one prefill, any number of runs."""

    created: str
    versions: dict[str, str]
    model: ModelInfo
    prompt: Prompt
    prefill_seconds: float
    runs: list[Run] = field(default_factory=list)
    schema: int = SCHEMA

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
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"this record has schema {_show(data.get('schema'))}, and schema {SCHEMA} is read "
                "here; open it with the version that wrote it"
            )
        trace: Trace = _read(cls, data, "record")
        _check(trace)
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


def _check(trace: Trace) -> None:
    """Ranges and sizes that types alone do not say."""
    model, prompt = trace.model, trace.prompt
    _within("model.num_layers", model.num_layers, 1, MAX_LAYERS)
    _within("model.num_query_heads", model.num_query_heads, 1, MAX_HEADS)
    _within("model.num_kv_heads", model.num_kv_heads, 1, model.num_query_heads)
    _within("model.head_dim", model.head_dim, 1, MAX_COUNT)
    _within("model.max_positions", model.max_positions, 1, MAX_COUNT)
    for place in model.sliding_layers:
        _within("a place in model.sliding_layers", place, 0, model.num_layers - 1)
    _within("prefill_seconds", trace.prefill_seconds, 0, MAX_COUNT)
    _within("prompt.length", prompt.length, 1, MAX_POSITIONS)
    _within("prompt.original_length", prompt.original_length, prompt.length, MAX_COUNT)
    end = len(prompt.text.encode("utf-16-le", "surrogatepass")) // 2
    _within(
        "the number of prompt.text_utf16_offsets", len(prompt.text_utf16_offsets), prompt.length
    )
    for index, pair in enumerate(prompt.text_utf16_offsets):
        _span(f"prompt.text_utf16_offsets[{index}]", pair, end)
    _span("prompt.document_span", prompt.document_span, prompt.length)
    _span("prompt.question_span", prompt.question_span, prompt.length)
    _span("prompt.document_utf16_span", prompt.document_utf16_span, end)
    _within("the number of runs", len(trace.runs), 0, MAX_RUNS)
    for index, run in enumerate(trace.runs):
        _check_run(run, f"runs[{index}]", model, prompt.length)


def _check_run(run: Run, where: str, model: ModelInfo, length: int) -> None:
    _within(f"the number of {where}.budgets", len(run.budgets), model.num_layers)
    for kept in run.budgets:
        _within(f"a budget of {where}", kept, 0, length)
    _within(f"the number of {where}.budget_history", len(run.budget_history), 0, model.num_layers)
    for update in run.budget_history:
        _within(f"an update's layers in {where}.budget_history", len(update), 1, model.num_layers)
        for budget in update:
            _within(f"a budget in {where}.budget_history", budget, 0, MAX_COUNT)
    if run.retained.heads not in (model.num_kv_heads, model.num_query_heads):
        _misfit(f"{where}.retained.heads", run.retained.heads, "the model's KV or query heads")
    if run.finish_reason not in FINISH_REASONS:
        _misfit(f"{where}.finish_reason", run.finish_reason, f"one of {', '.join(FINISH_REASONS)}")
    for name, values in (
        ("pieces", run.pieces),
        ("logprobs", run.logprobs),
        ("decode_seconds", run.decode_seconds),
    ):
        _within(f"the number of {where}.{name}", len(values), len(run.token_ids))
    for name in ("kv_bytes", "kv_bytes_full", "score_seconds", "prune_seconds"):
        _within(f"{where}.{name}", getattr(run, name), 0, MAX_COUNT)
    for name in ("token_ids", "decode_seconds"):
        _within(f"the least of {where}.{name}", min(getattr(run, name), default=0), 0, MAX_COUNT)
    _within(f"{where}.kept_fraction", run.kept_fraction, 0, 1)
    _within(f"{where}.decoded_together", run.decoded_together, 1, MAX_RUNS)
    if run.agreement is not None:
        _within(f"{where}.agreement.token_match", run.agreement.token_match, 0, 1)
        _within(f"{where}.agreement.rouge_l", run.agreement.rouge_l, 0, 1)
        divergence = run.agreement.first_divergence or 0
        _within(f"{where}.agreement.first_divergence", divergence, 0, MAX_COUNT)
        if run.agreement.divergence is not None:
            _check_divergence(run.agreement.divergence, f"{where}.agreement.divergence")
    try:
        json.dumps(run.parameters, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        _misfit(f"{where}.parameters", run.parameters, "finite numbers and plain text")
    run.retained.unpack(model.num_layers, length)
    if run.scores is not None:
        run.scores.unpack(model.num_layers, length)


def _check_divergence(divergence: Divergence, where: str) -> None:
    for name in ("token_ids", "pieces", "probabilities", "probabilities_full"):
        _within(f"the number of {where}.{name}", len(getattr(divergence, name)), 2)
    _within(f"the least of {where}.token_ids", min(divergence.token_ids), 0, MAX_COUNT)
    for share in (*divergence.probabilities, *divergence.probabilities_full):
        _within(f"a probability of {where}", share, 0, 1)


def _within(where: str, value: float, least: int, most: int | None = None) -> None:
    most = least if most is None else most
    if not least <= value <= most:
        _misfit(where, value, str(least) if least == most else f"{least} to {most}")


def _span(where: str, span: list[int], limit: int) -> None:
    if len(span) != 2 or not 0 <= span[0] <= span[1] <= limit:
        _misfit(where, span, f"[start, end) within 0..{limit}")


def _read(kind: Any, value: Any, where: str) -> Any:
    """Build `kind` (a dataclass, list, dict, union or scalar type) from JSON data, or say what does
    not fit."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        choices = typing.get_args(kind)
        if value is None:
            return None if type(None) in choices else _misfit(where, value, kind)
        return _read(next(choice for choice in choices if choice is not type(None)), value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            _misfit(where, value, "an object")
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        missing = [
            f.name
            for f in fields
            if f.name not in value
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{where}.{missing[0]} is missing; choose a complete run record")
        return kind(
            **{
                f.name: _read(hints[f.name], value[f.name], f"{where}.{f.name}")
                for f in fields
                if f.name in value
            }
        )
    if origin is list:
        if not isinstance(value, list):
            _misfit(where, value, "a list")
        (item,) = typing.get_args(kind)
        return [_read(item, element, f"{where}[{index}]") for index, element in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            _misfit(where, value, "an object")
        return {
            str(key): _read(typing.get_args(kind)[1], element, f"{where}.{key}")
            for key, element in value.items()
        }
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        _misfit(where, value, NAMES[kind])
    if kind is float and not math.isfinite(value):
        _misfit(where, value, "a finite number")
    if kind is str and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            _misfit(where, value, "text without lone surrogates")
    return value


def _decode_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where} is not base64; save the run again") from None


def _misfit(where: str, value: Any, expected: Any) -> typing.NoReturn:
    raise ValueError(f"{where} is {_show(value)}, expected {expected}; choose a record saved here")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
