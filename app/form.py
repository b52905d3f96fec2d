"""The form by names: from the widgets' values to a request, and from a record back to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dynamickv as dkv

from .inputs import DEFAULT_BUFFER, Request, build_request
from .record.words import document_of
from .settings import CAPACITIES, SETTINGS, defaults, form_defaults, offered_methods

FIELDS = (
    "document",
    "question",
    "methods",
    *SETTINGS,
    "max_new_tokens",
    "decode_budget",
    "decode_buffer",
    "truncate",
    "question_aware",
    "model",
    "expected",
)
"""The form's values, in the order in which the page sends them and takes them back."""

DOT = "\u00b7"
"""Stands for a character where a record is saved without its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What stands in the form, by name, whatever a browser sent: nothing here is checked yet."""

    document: Any = ""
    question: Any
    methods: Any
    settings: Mapping[str, Any]
    """One value for each of `SETTINGS`."""
    max_new_tokens: Any
    truncate: Any
    question_aware: Any
    model: Any
    expected: Any = ""
    decode_budget: Any = 0
    decode_buffer: Any = DEFAULT_BUFFER

    @classmethod
    def of(cls, values: Sequence[Any], names: Sequence[str] = FIELDS) -> Form:
        """From the widgets' values.

        Raises:
            ValueError: more or fewer values than names.
        """
        given = dict(zip(names, values, strict=True))
        settings = {name: given.pop(name) for name in SETTINGS}
        return cls(settings=settings, **given)

    def request(self) -> Request:
        """The comparison it asks for.

        Raises:
            ValueError: the first thing that is wrong, in one sentence.
        """
        return build_request(
            self.document,
            self.question,
            self.methods,
            self.max_new_tokens,
            self.settings,
            truncate=self.truncate,
            question_aware=self.question_aware,
            expected=self.expected,
            decode_budget=self.decode_budget,
            decode_buffer=self.decode_buffer,
        )


def form_of(trace: dkv.Trace, models: list[str]) -> dict[str, Any]:
    """What the form must say to run a record again; what it cannot say is left out."""
    # Of a record from a stranger only parameters that its method takes reach the widgets.
    settings = {name: form_defaults().get(name) for name in SETTINGS}
    for run in trace.runs:
        if method_of(run):
            settings |= set_by_hand(run)
    capacity = settings["capacity"]
    if not isinstance(capacity, int) or not CAPACITIES[0] <= capacity <= CAPACITIES[1]:
        del settings["capacity"]
    decoding = decoding_of(trace)
    names = {run.method for run in trace.runs} | {"FullKV"}
    model = {"model": trace.model.name} if trace.model.name in models else {}
    texts = {"document": document_of(trace.prompt), "question": trace.prompt.question}
    if without_text(trace):
        texts = {"document": "", "question": ""}
    return {
        **texts,
        "methods": [name for name in offered_methods() if name in names],
        **settings,
        "decode_budget": decoding.budget if decoding else 0,
        "decode_buffer": decoding.buffer if decoding else DEFAULT_BUFFER,
        "truncate": trace.prompt.truncated,
        "question_aware": trace.prompt.question_aware,
        "expected": trace.expected.text if trace.expected else "",
        **model,
    }


def decoding_of(trace: dkv.Trace) -> dkv.Decoding | None:
    """How compression went on in a record's answers, where it did; records come from strangers."""
    for run in trace.runs:
        try:
            if run.decoding:
                return dkv.Decoding(**run.decoding)
        except (TypeError, ValueError):
            continue
    return None


def decoding_for(method: dkv.CompressionMethod, trace: dkv.Trace) -> dkv.Decoding | None:
    """The decoding of the runs beside which a method answers, where it can choose again too."""
    decoding = decoding_of(trace)
    try:
        if decoding is not None:
            decoding.of_answer(method)
    except ValueError:
        return None
    return decoding


def without_text(trace: dkv.Trace) -> bool:
    """Whether a record was saved without its text: dots stand for letters (static/core.js)."""
    text = trace.prompt.text
    return DOT in text and not any(character.isalnum() for character in text)


def set_by_hand(run: dkv.Run) -> dict[str, Any]:
    """A run's settings that are not its method's own defaults: those would read as everyone's."""
    method = dkv.METHODS[run.method]
    own = defaults(method)
    return {
        name: value
        for name, value in run.parameters.items()
        if name in SETTINGS and name not in method.ignored and (name, value) not in own.items()
    }


def method_of(run: dkv.Run) -> dkv.CompressionMethod | None:
    """The method that a run's parameters describe, or None where they describe none."""
    try:
        return dkv.METHODS[run.method](**run.parameters)
    except (KeyError, TypeError, ValueError):
        return None
