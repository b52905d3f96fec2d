"""A record on the page: its answer cards, and what the views below them draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dynamickv as dkv
from app.examples import Example
from app.record.cards import cards_payload
from app.record.payload import trace_payload
from app.record.words import document_of, source_label
from app.views import render_figures

from .shelf import Shelf


class Shown:
    """Shows records that lie on the shelf, and those of built-in examples."""

    def __init__(self, shelf: Shelf, examples: Mapping[str, Example]) -> None:
        self._shelf, self._examples = shelf, examples

    def example(self, example: Example) -> tuple[dict[str, Any], dict[str, Any]]:
        """Cards and store of an example's recorded run."""
        assert example.trace is not None
        return self.record(example.trace, "recorded", example.key, example=example.id)

    def record(
        self, trace: dkv.Trace, kind: str, key: str, *, example: str = "", added: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Cards and store of a record that lies under `key`."""
        label = source_label(kind, trace.created) + (", one run added here" if added else "")
        held = self._shelf.get(key)
        ready = held is not None and held.prefill is not None
        return cards_payload(trace, label, self._found(trace)), trace_payload(
            trace, label, render_figures(trace), key=key, example=example, ready=ready
        )

    def _found(self, trace: dkv.Trace) -> list[list[bool]] | None:
        """Which facts each answer holds of those that the example expects whose text and question
        these are; None where they are of no example.
        """
        prompt = trace.prompt
        for example in self._examples.values():
            asked = example.expected and example.question.strip() == prompt.question.strip()
            if asked and example.is_document(document_of(prompt)):
                return [example.facts_in(run.answer) for run in trace.runs]
        return None
