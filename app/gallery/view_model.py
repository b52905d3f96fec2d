"""Recorded losses -> what the gallery shows. Pure functions; no widgets, no model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import dynamickv as dkv
from app.examples import Example
from app.record.words import run_names
from app.theme import method_style


def gallery_payload(
    examples: Iterable[Example], offered: Collection[str] = ()
) -> list[dict[str, Any]]:
    """One card for every loss with a readable record; `offered` are the models of this page."""
    return [
        card(example, example.trace, offered)
        for example in examples
        if example.lost and example.trace is not None
    ]


def card(example: Example, trace: dkv.Trace, offered: Collection[str] = ()) -> dict[str, Any]:
    """Model, question, what is lost and why, every method's answer, and whether it can be run."""
    name = trace.model.name
    elsewhere = (
        f"Recorded with {name}, which this page does not offer: it opens, and Run would answer with"
        " another model."
    )
    return {
        "id": example.id,
        "title": example.title,
        "model": example.model,
        "question": example.question,
        "lost": example.lost,
        "about": f"{trace.prompt.length:,} tokens, capacity {example.capacity:,}",
        "address": f"?ex={example.id}",
        "elsewhere": "" if name in offered else elsewhere,
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
