"""Lessons: a recorded run with all methods, what lies behind DynamicKV's updates, and a teacher's
notes, read from assets/lessons.
"""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dynamickv as dkv
from app.examples import ASSETS
from dynamickv.record.trace import Trace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesson:
    """One recorded document, its question, and what a teacher says about it."""

    id: str
    title: str
    example: str
    """The built-in example with the same document, question and capacity."""
    evidence: list[str]
    """Passages of the document that hold the answer."""
    notes: dict[str, Any]
    """`aim`, `point` (what to point at) and `questions` ({ask, answer}); `{name}` stands for a
    number."""
    trace: Trace
    behind: dict[str, Any]
    """What a record has no place for, see benchmarks/record_lessons.py: `attention`, `log_scores`
    and `counts`."""

    @cached_property
    def method(self) -> dkv.DynamicKV:
        """DynamicKV as it was run."""
        return dkv.DynamicKV(**self.trace.run("DynamicKV").parameters)

    @cached_property
    def spans(self) -> list[list[int]]:
        """[first, last] token of every piece of evidence."""
        return [token_span(self.trace, passage) for passage in self.evidence]


def load_lessons(assets: Path = ASSETS) -> dict[str, Lesson]:
    """Every readable lesson, in the order of records.json; a broken one is left out."""
    plans = json.loads((assets / "lessons" / "records.json").read_text(encoding="utf-8"))
    found = {}
    for name in plans:
        if "question" in plans[name]:
            continue
        try:
            found[name] = read_lesson(name, plans[name]["example"], assets)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("lesson %s left out: %s", name, error)
    return found


def read_lesson(name: str, example_id: str, assets: Path = ASSETS) -> Lesson:
    """One lesson from its files."""
    folder = assets / "lessons"
    notes = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    behind = json.loads(gzip.decompress((folder / f"{name}.behind.json.gz").read_bytes()))
    example = json.loads((assets / "examples" / f"{example_id}.json").read_text(encoding="utf-8"))
    return Lesson(
        id=name,
        title=str(notes["title"]),
        example=example_id,
        evidence=list(example["evidence"]),
        notes=notes,
        trace=Trace.load(folder / f"{name}.json.gz"),
        behind=behind,
    )


def token_span(trace: Trace, passage: str) -> list[int]:
    """[first, last] token of a passage that occurs in the document.

    Raises:
        ValueError: it does not occur.
    """
    place = trace.prompt.text.find(passage)
    if place < 0:
        raise ValueError(f"the evidence {passage[:40]!r} is not in the recorded document")
    start = utf16_length(trace.prompt.text[:place])
    end = start + utf16_length(passage)
    inside = [
        token
        for token, (left, right) in enumerate(trace.prompt.text_utf16_offsets)
        if left < end and right > start
    ]
    return [inside[0], inside[-1]]


def utf16_length(text: str) -> int:
    """Length of a text in UTF-16 units."""
    return len(text.encode("utf-16-le")) // 2
