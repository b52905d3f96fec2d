"""Long texts in which facts are hidden at a given depth, of a given length in tokens."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamickv.evaluate.data import data_file

Count = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Facts to hide, the question that asks for them, and what the answer must hold."""

    facts: tuple[str, ...]
    question: str
    expected: tuple[str, ...]


def invent(number: int, rng: random.Random) -> Hidden:
    """Different places with a code of five digits each, so that no model knows the answer.

    Raises:
        ValueError: fewer than 1 or more facts than there are places.
    """
    words = data_file("haystack.json")
    places = words["places"]
    if not 1 <= number <= len(places):
        raise ValueError(f"needles must be from 1 to {len(places)}, got {number}")
    chosen = rng.sample(places, number)
    values = [str(value) for value in rng.sample(range(10000, 100000), number)]
    facts = [
        words["needle"].format(place=place, value=value)
        for place, value in zip(chosen, values, strict=True)
    ]
    if number == 1:
        question = words["question"].format(place=chosen[0])
    else:
        several = ", ".join(chosen[:-1]) + words["and"] + chosen[-1]
        question = words["question_several"].format(places=several)
    return Hidden(tuple(facts), question, tuple(values))


class Haystack:
    """Sentences without end, from the text files of a folder or made up."""

    def __init__(self, folder: str | None = None) -> None:
        self._sentences = None if folder is None else _sentences_of(Path(folder))

    @property
    def name(self) -> str:
        """ "generated", or a hash of the folder's texts."""
        if self._sentences is None:
            return "generated"
        return hashlib.sha256("\n".join(self._sentences).encode("utf-8")).hexdigest()[:16]

    def sentences(self, rng: random.Random, tokens: int, count: Count) -> list[str]:
        """Sentences of at most `tokens` in all, from a place that `rng` chooses."""
        chosen: list[str] = []
        held = 0
        start = rng.randrange(len(self._sentences)) if self._sentences else 0
        while True:
            sentence = (
                self._sentences[(start + len(chosen)) % len(self._sentences)]
                if self._sentences
                else _invented_sentence(rng)
            )
            held += count(f" {sentence}")
            if held > tokens:
                return chosen
            chosen.append(sentence)


def hide(sentences: Sequence[str], facts: Sequence[str], depth: float, count: Count) -> str:
    """The text with the first fact at `depth` (0 start, 1 end, in tokens) and the others evenly
    spread from there to the end, each between two sentences."""
    sizes = [count(f" {sentence}") for sentence in sentences]
    total = sum(sizes)
    wanted = [(depth + (1 - depth) * place / len(facts)) * total for place in range(len(facts))]
    parts: list[str] = []
    passed = 0.0
    waiting = list(zip(wanted, facts, strict=True))
    for sentence, size in zip(sentences, sizes, strict=True):
        while waiting and passed + size / 2 >= waiting[0][0]:
            parts.append(waiting.pop(0)[1])
        parts.append(sentence)
        passed += size
    return " ".join([*parts, *(fact for _, fact in waiting)])


def _invented_sentence(rng: random.Random) -> str:
    words = data_file("haystack.json")
    return " ".join(rng.choice(words[part]) for part in ("who", "did", "what", "when")) + "."


def _sentences_of(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one with .txt files")
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise ValueError(f"the folder {folder} holds no .txt files; put some texts into it")
    sentences: list[str] = []
    for path in paths:
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; save it as plain text first") from None
        sentences += [part.strip() for part in re.split(r"(?<=[.!?。！？])\s*|\n+", text)]  # noqa: RUF001
    kept = [sentence for sentence in sentences if sentence]
    if not kept:
        raise ValueError(f"the texts in {folder} are empty; put some text into them")
    return kept
