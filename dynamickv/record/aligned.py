"""FullKV's answer word by word, with how probable each word is under the full and under a
compressed cache: which words survive the compression, and which one carries the loss.

Every cache is fed FullKV's own answer (teacher forcing), so that one early difference does not
hide the later ones. Plain data and pure functions: no torch, no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

LOST = 0.5
"""A word is lost where less than this part of its probability survives."""
_WORD = re.compile(r"[^\W_]+(?:[-'\u2019.,:_/][^\W_]+)*")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
"""Letters of scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Han."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """FullKV's answer as a run's cache would go on with it; one entry per word."""

    utf16_spans: list[list[int]]
    """[start, end) of every word in FullKV's answer, in UTF-16 units, white space left out."""
    token_spans: list[list[int]]
    """[first, last) of its tokens; the token that ends the answer is part of no word."""
    probabilities: list[float]
    """Of the word under this run's cache, FullKV's words before it given: the product over its
    tokens."""
    probabilities_full: list[float]
    """The same under the full cache."""
    instead: list[str]
    """The token that this cache finds most probable where it would first leave the word; empty
    where it would say the same."""
    instead_probabilities: list[float]
    """Its probability under this cache; 0 where there is none."""
    surviving: float
    """Mean surviving probability, 0 to 1: over words, min(1, probability / probability_full)."""
    loss: int | None
    """The word that carries the loss: among words of which less than half of the probability
    survives, the one whose probability falls most. None where no word is lost."""

    @property
    def shares(self) -> list[float]:
        """The part of every word's probability that survives, 0 to 1."""
        return surviving(self.probabilities, self.probabilities_full)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """What one cache says along FullKV's answer, token by token."""

    probabilities: list[float]
    """Of the answer's own tokens."""
    likeliest: list[int]
    """The most probable token at each place."""
    likeliest_probabilities: list[float]


def aligned(
    pieces: Sequence[str],
    token_ids: Sequence[int],
    full: Forced,
    own: Forced,
    texts: Sequence[str],
) -> Aligned | None:
    """Join an answer's tokens to words and say what became of each; None for an answer of none.

    Args:
        pieces: text of each of FullKV's tokens.
        full, own: under the full cache, and under the run's.
        texts: text of each of `own.likeliest`.
    """
    spans = word_tokens(pieces)
    if not spans:
        return None
    units = [0]
    for piece in pieces:
        units.append(units[-1] + _utf16(piece))
    here, there, instead, instead_share, places = [], [], [], [], []
    for first, last in spans:
        text = "".join(pieces[first:last])
        before = _utf16(text[: len(text) - len(text.lstrip())])
        places.append([units[first] + before, units[first] + _utf16(text.rstrip())])
        here.append(math.prod(own.probabilities[first:last]))
        there.append(math.prod(full.probabilities[first:last]))
        leaves = next((t for t in range(first, last) if own.likeliest[t] != token_ids[t]), None)
        instead.append("" if leaves is None else texts[leaves])
        instead_share.append(0.0 if leaves is None else own.likeliest_probabilities[leaves])
    kept = surviving(here, there)
    return Aligned(
        utf16_spans=places,
        token_spans=[list(span) for span in spans],
        probabilities=here,
        probabilities_full=there,
        instead=instead,
        instead_probabilities=instead_share,
        surviving=sum(kept) / len(kept),
        loss=word_lost(here, there),
    )


def surviving(probabilities: Sequence[float], full: Sequence[float]) -> list[float]:
    """The part of every word's probability that survives, 0 to 1; more than before counts as 1."""
    return [
        1.0 if own >= whole else own / whole for own, whole in zip(probabilities, full, strict=True)
    ]


def word_lost(probabilities: Sequence[float], full: Sequence[float]) -> int | None:
    """The word that carries the loss, as `Aligned.loss`."""
    drops = [
        (whole - own, -place)
        for place, (own, whole, kept) in enumerate(
            zip(probabilities, full, surviving(probabilities, full), strict=True)
        )
        if kept < LOST
    ]
    return -max(drops)[1] if drops else None


def word_tokens(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """[first, last) tokens of every word of an answer, in order.

    A word ends at white space, between a letter and a mark, and between letters of scripts that
    put no space between words; tokens are never split. A token that completes no character goes
    with the next that does; a group of white space alone is no word.
    """
    text = "".join(pieces)
    inside = _joined(text)
    spans: list[tuple[int, int]] = []
    first, end = 0, 0
    for token, piece in enumerate(pieces):
        if piece and end and end not in inside and "".join(pieces[first:token]):
            spans.append((first, _written(pieces, first, token)))
            first = spans[-1][1]
        end += len(piece)
    last = _written(pieces, first, len(pieces))
    if last > first:
        spans.append((first, last))
    return [span for span in spans if "".join(pieces[span[0] : span[1]]).strip()]


def _joined(text: str) -> set[int]:
    """Places of a text at which a word goes on, between the character before and the one at."""
    return {
        place
        for word in _WORD.finditer(text)
        for place in range(word.start() + 1, word.end())
        if not _UNSPACED.match(text[place]) and not _UNSPACED.match(text[place - 1])
    }


def _written(pieces: Sequence[str], first: int, last: int) -> int:
    """The end of those tokens without the last ones that have no text of their own."""
    while last > first and not pieces[last - 1]:
        last -= 1
    return last


def _utf16(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
