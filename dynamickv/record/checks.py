"""What a run record from a stranger must look like: types and sizes and ranges, and one sentence
where something does not fit.

`read` follows the types of any dataclass; `check` knows what they do not say about a record.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import TYPE_CHECKING, Any

from dynamickv.record.expected import MAX_EXPECTED
from dynamickv.record.kinds import KINDS

if TYPE_CHECKING:
    import numpy as np

    from dynamickv.record.aligned import Aligned
    from dynamickv.record.trace import Divergence, ModelInfo, Run, Trace

MAX_POSITIONS = 2**20
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_RUNS = 64
MAX_COUNT = 2**53
"""Largest count; JavaScript reads no larger whole number exactly."""
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
YARDSTICK = "FullKV"
"""The method whose answer the others are held against."""
FINISH_REASONS = ("stop", "length", "cancelled")
PRECISIONS = ("", "exact", "fast")


def check(trace: Trace) -> None:
    """Ranges and sizes that types alone do not say."""
    model, prompt = trace.model, trace.prompt
    _within("model.num_layers", model.num_layers, 1, MAX_LAYERS)
    _within("model.num_query_heads", model.num_query_heads, 1, MAX_HEADS)
    _within("model.num_kv_heads", model.num_kv_heads, 1, model.num_query_heads)
    _within("model.head_dim", model.head_dim, 1, MAX_COUNT)
    _within("model.max_positions", model.max_positions, 1, MAX_COUNT)
    for place in model.sliding_layers:
        _within("a place in model.sliding_layers", place, 0, model.num_layers - 1)
    if model.layer_kinds and len(model.layer_kinds) != model.num_layers:
        _misfit("the number of model.layer_kinds", len(model.layer_kinds), "the model's layers")
    for kind in model.layer_kinds:
        if kind not in KINDS:
            _misfit("a kind in model.layer_kinds", kind, f"one of {', '.join(KINDS)}")
    if model.precision not in PRECISIONS:
        _misfit("model.precision", model.precision, "exact, fast or nothing")
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
    if trace.expected is not None:
        _within("the length of expected.text", len(trace.expected.text), 1, MAX_EXPECTED)
        if trace.expected.document_utf16_span is not None:
            _span("expected.document_utf16_span", trace.expected.document_utf16_span, end)
    _within("the number of runs", len(trace.runs), 0, MAX_RUNS)
    full = next((run for run in trace.runs if run.method == YARDSTICK), None)
    for index, run in enumerate(trace.runs):
        _check_run(run, f"runs[{index}]", model, prompt.length)
        if run.aligned is not None:
            _check_aligned(run.aligned, f"runs[{index}].aligned", full)


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
    mask = run.retained.unpack(model.num_layers, length)
    if run.erased is not None:
        _within(f"{where}.erased", run.erased, int((~mask.any(axis=(0, 1))).sum()))
    _check_forgotten(run, where, model, mask)
    if run.scores is not None:
        run.scores.unpack(model.num_layers, length)


def _check_forgotten(run: Run, where: str, model: ModelInfo, before: np.ndarray) -> None:
    """Choices follow one another, each among what is held: `before`, (layers, heads, positions),
    and what was answered since."""
    if run.decoding is not None:
        names = sorted(run.decoding)
        if names != ["budget", "buffer"]:
            _misfit(f"{where}.decoding", names, "budget and buffer")
        for name in names:
            _within(f"{where}.decoding.{name}", run.decoding[name], 1, MAX_COUNT)
    elif run.forgotten:
        _misfit(f"the number of {where}.forgotten", len(run.forgotten), "none without decoding")
    length, last = before.shape[2], 0
    for index, choice in enumerate(run.forgotten):
        here = f"{where}.forgotten[{index}]"
        _within(f"{here}.position", choice.position, last, len(run.token_ids))
        _within(f"{here}.seconds", choice.seconds, 0, MAX_COUNT)
        if choice.retained.heads != before.shape[1]:
            _misfit(f"{here}.retained.heads", choice.retained.heads, "as many as the prompt's")
        mask = choice.retained.unpack(model.num_layers, length + choice.position)
        if (mask[..., : before.shape[2]] & ~before).any():
            _misfit(f"{here}.retained", "more than was held", "a choice among what was")
        before, last = mask, choice.position


def _check_divergence(divergence: Divergence, where: str) -> None:
    for name in ("token_ids", "pieces", "probabilities", "probabilities_full"):
        _within(f"the number of {where}.{name}", len(getattr(divergence, name)), 2)
    _within(f"the least of {where}.token_ids", min(divergence.token_ids), 0, MAX_COUNT)
    for share in (*divergence.probabilities, *divergence.probabilities_full):
        _within(f"a probability of {where}", share, 0, 1)


def _check_aligned(aligned: Aligned, where: str, full: Run | None) -> None:
    if full is None:
        _misfit(where, "there", f"none without a run of {YARDSTICK}")
    words = len(aligned.utf16_spans)
    _within(f"the number of {where}.utf16_spans", words, 1, MAX_COUNT)
    for name in ("token_spans", "probabilities", "probabilities_full", "instead"):
        _within(f"the number of {where}.{name}", len(getattr(aligned, name)), words)
    shares = aligned.instead_probabilities
    _within(f"the number of {where}.instead_probabilities", len(shares), words)
    units = len(full.answer.encode("utf-16-le", "surrogatepass")) // 2
    for name, limit in (("utf16_spans", units), ("token_spans", len(full.token_ids))):
        end = 0
        for index, span in enumerate(getattr(aligned, name)):
            _span(f"{where}.{name}[{index}]", span, limit)
            _within(f"the start of {where}.{name}[{index}]", span[0], end, MAX_COUNT)
            end = span[1]
    for share in (*aligned.probabilities, *aligned.probabilities_full, *shares):
        _within(f"a probability of {where}", share, 0, 1)
    _within(f"{where}.surviving", aligned.surviving, 0, 1)
    _within(f"{where}.loss", aligned.loss or 0, 0, words - 1)


def _within(where: str, value: float, least: int, most: int | None = None) -> None:
    most = least if most is None else most
    if not least <= value <= most:
        _misfit(where, value, str(least) if least == most else f"{least} to {most}")


def _span(where: str, span: list[int], limit: int) -> None:
    if len(span) != 2 or not 0 <= span[0] <= span[1] <= limit:
        _misfit(where, span, f"[start, end) within 0..{limit}")


def read(kind: Any, value: Any, where: str) -> Any:
    """Build `kind` (a dataclass, list, dict, union or scalar type) from JSON data, or say what does
    not fit."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        choices = typing.get_args(kind)
        if value is None:
            return None if type(None) in choices else _misfit(where, value, kind)
        return read(next(choice for choice in choices if choice is not type(None)), value, where)
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
                f.name: read(hints[f.name], value[f.name], f"{where}.{f.name}")
                for f in fields
                if f.name in value
            }
        )
    if origin is list:
        if not isinstance(value, list):
            _misfit(where, value, "a list")
        (item,) = typing.get_args(kind)
        return [read(item, element, f"{where}[{index}]") for index, element in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            _misfit(where, value, "an object")
        return {
            str(key): read(typing.get_args(kind)[1], element, f"{where}.{key}")
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


def _misfit(where: str, value: Any, expected: Any) -> typing.NoReturn:
    raise ValueError(f"{where} is {show(value)}, expected {expected}; choose a record saved here")


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
