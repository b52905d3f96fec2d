"""What a person expects in an answer, looked for in the document and in every answer.

Plain text search: it knows no meaning, and what is worded otherwise is not found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamickv.record.trace import Run

MAX_EXPECTED = 2**16
"""Characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A passage or an answer that a person expects."""

    text: str
    document_utf16_span: list[int] | None
    """[start, end) of its first place in the document, in UTF-16 units of the prompt's text; None
    where the document does not hold it."""


def find_expected(text: str, expected: str) -> tuple[int, int] | None:
    """[start, end) of the first place in `text`, in characters, that says `expected`, or None.

    Case and runs of white space do not count, and words are whole: "9" is not found in "1947".
    """
    words = expected.split()
    if not words:
        return None
    pattern = r"\s+".join(map(re.escape, words))
    # A script without spaces has no edges of words, so only letters of the alphabet ask for one.
    before = r"(?<![0-9A-Za-z])" if words[0][0].isascii() and words[0][0].isalnum() else ""
    after = r"(?![0-9A-Za-z])" if words[-1][-1].isascii() and words[-1][-1].isalnum() else ""
    found = re.search(before + pattern + after, text, re.IGNORECASE)
    return None if found is None else found.span()


def require_expected(text: object) -> None:
    """Raise ValueError for what cannot be looked for."""
    if not isinstance(text, str):
        raise ValueError(f"what is expected must be text, got {type(text).__name__}")
    if len(text) > MAX_EXPECTED:
        raise ValueError(
            f"what is expected has {len(text):,} characters; give at most {MAX_EXPECTED:,}"
        )


def with_expected(
    text: str, document: tuple[int, int], expected: str, runs: Sequence[Run]
) -> tuple[Expected | None, list[Run]]:
    """Look for it in a prompt's document, and in every run's answer.

    Args:
        text: the prompt's.
        document: [start, end) of the document in it, in characters.
        expected: empty where nothing is.
    """
    if not expected.strip():
        return None, [replace(run, expected_found=None) for run in runs]
    start, end = document
    place = find_expected(text[start:end], expected)
    span = None
    if place is not None:
        before = len(text[: start + place[0]].encode("utf-16-le")) // 2
        held = text[start + place[0] : start + place[1]]
        span = [before, before + len(held.encode("utf-16-le")) // 2]
    marked = [
        replace(run, expected_found=find_expected(run.answer, expected) is not None) for run in runs
    ]
    return Expected(text=expected.strip(), document_utf16_span=span), marked
