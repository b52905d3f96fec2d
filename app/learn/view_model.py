"""What the Learn tab shows of a lesson.

Every number told there is computed here from a record, with the engine's own code where it
computes; nothing is written down by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.examples import ASSETS
from app.record.aligned_words import words_of
from app.record.cards import cards, partings
from app.record.payload import trace_payload
from app.record.words import source_label
from app.views import VIEWS
from app.views.questions import render_questions
from app.wording import count, mebibytes, percent
from dynamickv.record.trace import Run, Trace

from .lessons import Lesson

FILM_METHODS = ("SnapKV", "DynamicKV")


def lesson_payload(lesson: Lesson) -> dict[str, Any]:
    """A lesson for the browser: the record as the explorer gets it, and what is told about it."""
    trace, numbers = lesson.trace, told_numbers(lesson)
    shown = replace(trace, runs=[trace.run(name) for name in FILM_METHODS])
    return {
        "id": lesson.id,
        "title": lesson.title,
        "example": lesson.example,
        "trace": shown_trace(trace, lesson.example),
        "film": VIEWS["budgets"].render(shown).to_json(),
        "cards": cards(trace),
        "partings": partings(trace),
        "words": words_of(trace),
        "scores": lesson.behind["log_scores"],
        "attention": lesson.behind["attention"],
        "spans": lesson.spans,
        "survival": {run.method: survival(run, trace, lesson.spans) for run in trace.runs},
        "updates": updates(lesson),
        "parameters": lesson.method.parameters | {"mean_budget": lesson.method.mean_budget},
        "numbers": numbers,
        "notes": fill(lesson.notes, numbers),
    }


def shown_trace(trace: Trace, example: str) -> dict[str, Any]:
    """A record as the explorer's views read it."""
    return trace_payload(trace, source_label("recorded", trace.created), example=example)


def pair_payload(assets: Path = ASSETS) -> dict[str, Any] | None:
    """One document asked twice: an example's own run and one with another question, and how far
    DynamicKV's choices lie apart; None without such a record.
    """
    plans = json.loads((assets / "lessons" / "records.json").read_text(encoding="utf-8"))
    asked = [(name, plan["example"]) for name, plan in plans.items() if "question" in plan]
    if not asked:
        return None
    name, example = asked[0]
    first = Trace.load(assets / "runs" / f"{example}.json.gz")
    second = Trace.load(assets / "lessons" / f"{name}.json.gz")
    return {
        "traces": [shown_trace(two_runs(trace), example) for trace in (first, second)],
        "figure": render_questions(first, second).to_json(),
        "answers": [
            {run.method: run.answer for run in two_runs(trace).runs} for trace in (first, second)
        ],
        "numbers": pair_numbers(first, second),
    }


def two_runs(trace: Trace) -> Trace:
    """The record with FullKV and DynamicKV alone."""
    return replace(trace, runs=[trace.run("FullKV"), trace.run("DynamicKV")])


def pair_numbers(first: Trace, second: Trace) -> dict[str, str]:
    """What moves in DynamicKV's choice when only the question changes."""
    one, other = document_mask(first), document_mask(second)
    moved = sum(
        abs(a - b)
        for a, b in zip(
            first.run("DynamicKV").budgets, second.run("DynamicKV").budgets, strict=True
        )
    )
    both, either = int((one & other).sum()), int((one | other).sum())
    return {
        "both": percent(both / either),
        "moved": f"{moved // 2:,}",
        "total": f"{sum(first.run('DynamicKV').budgets):,}",
    }


def document_mask(trace: Trace) -> np.ndarray:
    """What DynamicKV keeps of the document, boolean (layers, heads, tokens)."""
    first, last = trace.prompt.document_span
    run = trace.run("DynamicKV")
    return run.retained.unpack(trace.model.num_layers, trace.prompt.length)[:, :, first:last]


def updates(lesson: Lesson) -> list[dict[str, Any]]:
    """Every step of every update, recomputed by the engine from the recorded counts."""
    trace, method = lesson.trace, lesson.method
    prefix = trace.prompt.length - method.window_size
    heads = trace.run("DynamicKV").retained.heads
    return [
        asdict(method.settle(counts, heads, prefix, trace.model.num_layers))
        for counts in lesson.behind["counts"]
    ]


def survival(run: Run, trace: Trace, spans: list[list[int]]) -> list[float]:
    """Per layer: the part of the evidence (tokens x heads) that a run keeps."""
    mask = run.retained.unpack(trace.model.num_layers, trace.prompt.length)
    tokens = [token for first, last in spans for token in range(first, last + 1)]
    return [float(share) for share in mask[:, :, tokens].mean(axis=(1, 2))]


def told_numbers(lesson: Lesson) -> dict[str, str]:
    """Numbers that texts name, as they are shown."""
    trace, method = lesson.trace, lesson.method
    full, ours = trace.run("FullKV"), trace.run("DynamicKV")
    layers, length = trace.model.num_layers, trace.prompt.length
    steps = updates(lesson)
    first, window, tenth = np.mean(lesson.behind["attention"], axis=0)
    most = ours.budgets.index(max(ours.budgets))
    least = ours.budgets.index(min(ours.budgets))
    numbers = {
        "tokens": f"{length:,}",
        "answer_tokens": f"{len(full.token_ids):,}",
        "layers": f"{layers}",
        "last_layer": f"{layers - 1}",
        "kv_heads": f"{trace.model.num_kv_heads}",
        "query_heads": f"{trace.model.num_query_heads}",
        "head_dim": f"{trace.model.head_dim}",
        "full": mebibytes(full.kv_bytes),
        "per_token": f"{full.kv_bytes / length / 1024:.1f} KiB",
        "kept_bytes": mebibytes(ours.kv_bytes),
        "kept": percent(ours.kept_fraction),
        "capacity": f"{method.capacity:,}",
        "window": f"{method.window_size}",
        "mean_budget": f"{method.mean_budget:,}",
        "r_max": f"{method.r_max:g}",
        "interval": f"{method.update_interval}",
        "updates": f"{len(steps)}",
        "total": f"{method.mean_budget * layers:,}",
        "first_budget": f"{method.first_budget(0, layers, length - method.window_size):,}",
        "most": f"{ours.budgets[most]:,}",
        "most_layer": f"{most}",
        "least": f"{ours.budgets[least]:,}",
        "least_layer": f"{least}",
        "first_layer_then": f"{steps[0]['budgets'][0]:,}",
        "first_layer_now": f"{steps[-1]['budgets'][0]:,}",
        "to_first": percent(float(first)),
        "to_window": percent(float(window)),
        "to_tenth": percent(float(tenth)),
        "to_others": percent(float(1 - first - window - tenth)),
        "evidence_tokens": count(sum(b - a + 1 for a, b in lesson.spans), "token"),
    }
    for run in trace.runs:
        key = run.method.lower()
        kept = survival(run, trace, lesson.spans)
        numbers |= {
            f"answer_{key}": run.answer,
            f"kept_{key}": percent(run.kept_fraction),
            f"survives_{key}": f"{sum(share > 0 for share in kept)}",
            f"evidence_{key}": percent(sum(kept) / len(kept)),
            f"parts_{key}": parting(run),
        }
    return numbers


def parting(run: Run) -> str:
    """Where an answer leaves FullKV's."""
    at = run.agreement.first_divergence if run.agreement else None
    return "never" if at is None else f"token {at + 1}"


def fill(notes: Any, numbers: Mapping[str, str]) -> Any:
    """The notes with their numbers in place."""
    if isinstance(notes, str):
        return notes.format_map(numbers)
    if isinstance(notes, list):
        return [fill(item, numbers) for item in notes]
    if isinstance(notes, dict):
        return {key: fill(value, numbers) for key, value in notes.items()}
    return notes
