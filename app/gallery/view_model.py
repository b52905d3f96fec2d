"""Recorded losses -> what the gallery shows. Pure functions; no widgets, no model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import dynamickv as dkv
from app.examples import Example
from app.record.words import run_names
from app.theme import method_style


def gallery_payload(examples: Iterable[Example]) -> list[dict[str, Any]]:
    """One card for every loss with a readable record."""
    return [
        card(example, example.trace)
        for example in examples
        if example.lost and example.trace is not None
    ]


def card(example: Example, trace: dkv.Trace) -> dict[str, Any]:
    """Model, question, what is lost and why, and every method's answer."""
    return {
        "id": example.id,
        "title": example.title,
        "model": example.model,
        "question": example.question,
        "lost": example.lost,
        "about": f"{trace.prompt.length:,} tokens, capacity {example.capacity:,}",
        "address": f"?ex={example.id}",
        "rows": [
            {
                "label": label,
                "method": look,
                "glyph": method_style(look).glyph,
                "answer": run.answer,
                "holds": all(example.facts_in(run.answer)),
            }
            for run, (look, label) in zip(trace.runs, run_names(trace.runs), strict=True)
        ],
    }
