"""What people enter, checked: texts and numbers become a `Request`, or one sentence says what to
change. Uploaded files are in uploads.py.

Every entry point of the page and of its endpoints goes through here: what a browser's form allows
is only a hint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import dynamickv as dkv

from .settings import WHAT_IF_SETTINGS, WHOLE, form_defaults, offered_methods

MAX_CHARACTERS = 1_000_000
MAX_QUESTION_CHARACTERS = 20_000
MAX_NEW_TOKENS = 512
DEFAULT_NEW_TOKENS = 64
DEFAULT_BUFFER = 16
"""Answers on the page are short."""
DEFAULT_METHODS = ("FullKV", "DynamicKV")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A comparison to run."""

    document: str
    question: str
    methods: list[dkv.CompressionMethod]
    max_new_tokens: int
    truncate: bool = False
    question_aware: bool = True
    expected: str = ""
    """A passage or an answer to look for; empty where nothing is expected."""
    decoding: dkv.Decoding | None = None
    """How compression goes on while answering; None where it does not."""


def check_texts(document: Any, question: Any) -> tuple[str, str]:
    """Document and question, if there is something to read and something to ask.

    Raises:
        ValueError: one sentence.
    """
    if not isinstance(document, str) or not isinstance(question, str):
        raise ValueError("Document and question must be text.")
    if not document.strip():
        raise ValueError("The document is empty: paste a text, upload a file or pick an example.")
    if not question.strip():
        raise ValueError("The question is empty: type what you want to know about the document.")
    if len(document) > MAX_CHARACTERS:
        raise ValueError(
            f"The document has {len(document):,} characters and this page reads "
            f"{MAX_CHARACTERS:,}: shorten it."
        )
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise ValueError(
            f"The question has {len(question):,} characters and this page reads "
            f"{MAX_QUESTION_CHARACTERS:,}: shorten it."
        )
    if len(question) > len(document):
        raise ValueError(
            "The question is longer than the document: put the long text into Document "
            "and keep the question short."
        )
    return document, question


def check_expected(text: Any) -> str:
    """What is expected, without white space around it.

    Raises:
        ValueError: one sentence.
    """
    if not isinstance(text, str):
        raise ValueError("What you expect must be text.")
    if len(text) > MAX_QUESTION_CHARACTERS:
        raise ValueError(
            f"What you expect has {len(text):,} characters and this page looks for at most "
            f"{MAX_QUESTION_CHARACTERS:,}: shorten it."
        )
    return text.strip()


def build_decoding(
    budget: Any, buffer: Any, methods: Sequence[dkv.CompressionMethod]
) -> dkv.Decoding | None:
    """How compression goes on while answering; None for a budget of 0 or none at all.

    Raises:
        ValueError: one sentence, also where one of the methods cannot choose again.
    """
    if budget in (None, 0, ""):
        return None
    most = dkv.trace.MAX_POSITIONS
    decoding = dkv.Decoding(
        budget=whole_number("decode_budget", budget, 1, most),
        buffer=whole_number("decode_buffer", buffer, 1, most),
    )
    for method in methods:
        if method.capabilities.capacity:
            decoding.of_answer(method)
    return decoding


def build_methods(names: Any, settings: Mapping[str, Any]) -> list[dkv.CompressionMethod]:
    """Method instances in the registry's order, FullKV always among them; each takes the settings
    it knows.

    Raises:
        ValueError: an unknown name or a bad parameter.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"Methods must be a list of names; choose from {', '.join(dkv.METHODS)}.")
    for name in names:
        if name not in dkv.METHODS:
            raise ValueError(f"Unknown method {name!r}; choose from {', '.join(dkv.METHODS)}.")
    chosen = [name for name in dkv.METHODS if name == "FullKV" or name in names]
    return [build_method(name, settings) for name in chosen]


def build_method(name: str, settings: Mapping[str, Any]) -> dkv.CompressionMethod:
    """One method with the settings that are among its parameters.

    A setting left at the form's default leaves the method its own: H2O, say, does not pool.
    """
    method = dkv.METHODS[name]
    known = {field.name for field in fields(method)}
    untouched = form_defaults()
    return method(
        **{
            key: value
            for key, value in settings.items()
            if key in known and (key not in untouched or value != untouched[key])
        }
    )


def build_what_if(asked: Any) -> dkv.CompressionMethod:
    """The method a what-if asks for: {"method", "settings", "budgets", "pinned", "evicted"},
    whatever a browser sent.

    `budgets`, one number per layer, makes it a `Manual` with the settings that it takes.

    Raises:
        ValueError: one sentence.
    """
    if not isinstance(asked, Mapping) or not isinstance(asked.get("settings", {}), Mapping):
        raise ValueError("A what-if needs a method and its settings.")
    settings = {k: v for k, v in asked.get("settings", {}).items() if k in WHAT_IF_SETTINGS}
    settings = whole_numbers(settings) | read_spans(asked)
    budgets = asked.get("budgets")
    if budgets is None:
        name = asked.get("method")
        if name not in offered_methods() or name == "FullKV":
            raise ValueError(
                f"Unknown method {name!r}; choose from {', '.join(offered_methods())}."
            )
        return build_method(str(name), settings)
    if not isinstance(budgets, list) or not 1 <= len(budgets) <= dkv.trace.MAX_LAYERS:
        raise ValueError("Budgets must be a list with one number of tokens per layer.")
    most = dkv.trace.MAX_POSITIONS
    rows = [whole_number(f"budgets[{i}]", b, 0, most) for i, b in enumerate(budgets)]
    known = {field.name for field in fields(dkv.Manual)} - {"capacity"}
    taken = {k: v for k, v in settings.items() if k in known}
    return dkv.Manual(budgets=rows, **taken)


MAX_SPANS = 64


def read_spans(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The spans of positions that a what-if pins and evicts, where there are any.

    Raises:
        ValueError: one sentence.
    """
    found = {}
    for name in ("pinned", "evicted"):
        spans = asked.get(name) or []
        if not isinstance(spans, list) or len(spans) > MAX_SPANS:
            raise ValueError(f"{name} must be a list of at most {MAX_SPANS} passages.")
        if not all(isinstance(span, list) and len(span) == 2 for span in spans):
            raise ValueError(f"{name} must hold [first, last) pairs of positions.")
        most = dkv.trace.MAX_POSITIONS
        if spans:
            found[name] = [[whole_number(name, end, 0, most) for end in span] for span in spans]
    return found


def whole_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those checked that count something."""
    numbers = dict(settings)
    for name in WHOLE:
        if name in numbers:
            numbers[name] = whole_number(name, numbers[name], 1, dkv.trace.MAX_POSITIONS)
    return numbers


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """An int within bounds; browsers send 128.0 for 128.

    Raises:
        ValueError: one sentence with name, value and bounds.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or int(value) != value
    ):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if not least <= value <= most:
        raise ValueError(f"{name} must lie between {least:,} and {most:,}, got {int(value):,}.")
    return int(value)


def build_request(
    document: Any,
    question: Any,
    methods: Any,
    max_new_tokens: Any,
    settings: Mapping[str, Any],
    *,
    truncate: Any = False,
    question_aware: Any = True,
    expected: Any = "",
    decode_budget: Any = 0,
    decode_buffer: Any = DEFAULT_BUFFER,
) -> Request:
    """Check everything at once.

    Raises:
        ValueError: the first thing that is wrong, in one sentence.
    """
    document, question = check_texts(document, question)
    numbers = whole_numbers(settings)
    chosen = build_methods(methods, numbers)
    return Request(
        document=document,
        question=question,
        methods=chosen,
        max_new_tokens=whole_number("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS),
        truncate=bool(truncate),
        question_aware=bool(question_aware),
        expected=check_expected(expected),
        decoding=build_decoding(decode_budget, decode_buffer, chosen),
    )
