"""Documents with several questions each: from SCBench's files, from a folder of texts, from one
text and its questions, or made up.

Source of what is made up: the key-value task of SCBench (Li et al. 2024, arXiv:2412.10319), with
shorter keys and values that small models can say.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamickv.evaluate.tasks import read_documents, read_questions

TURNS = "turns.json"
"""Beside a folder's texts: document -> its questions."""
NAMED = ("question", "input", "query")
EXPECTED = ("answers", "answer", "expected")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question."""

    question: str
    answers: tuple[str, ...] = ()
    """Texts of which the answer should contain one; none where nobody knows."""


Documents = dict[str, tuple[str, list[Asked]]]
"""By name: the text and its questions, the first one of which the cache is compressed for."""


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Made-up tables of keys and values, asked for one key after another."""

    samples: int = 8
    """Tables."""
    pairs: int = 60
    """Keys in each."""
    questions: int = 5
    """Keys asked for in each, no key twice."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.questions < 2:
            raise ValueError(
                f"asked must be at least 2, so that a question follows the first, "
                f"got {self.questions}"
            )
        if not self.questions <= self.pairs <= 9000:
            raise ValueError(
                f"pairs must be from the number of questions ({self.questions}) to 9,000, "
                f"got {self.pairs}"
            )

    def documents(self) -> Documents:
        """Every table, the same for a seed."""
        return {f"table-{number + 1}": self._table(number) for number in range(self.samples)}

    def _table(self, number: int) -> tuple[str, list[Asked]]:
        rng = random.Random(f"{self.seed} {number} {self.pairs}")
        keys = [f"K{key}" for key in rng.sample(range(1000, 10000), self.pairs)]
        values = [str(value) for value in rng.sample(range(10000, 100000), self.pairs)]
        lines = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
        # From all parts of the table, in no order.
        size = self.pairs / self.questions
        places = [rng.randrange(int(n * size), int((n + 1) * size)) for n in range(self.questions)]
        rng.shuffle(places)
        asked = [
            Asked(f'What is the value of the key "{keys[place]}"?', (values[place],))
            for place in places
        ]
        return "{" + ",\n ".join(lines) + "}", asked


def read_folder(folder: Path, limit: int | None = None) -> Documents:
    """SCBench's .jsonl files (`context` and `multi_turns` of `input` and `answer`), or .txt files
    with questions in turns.json or questions.json.

    Args:
        limit: first documents of each file, or of the folder's texts.

    Raises:
        ValueError: no such folder, nothing usable in it, or a document with fewer than two
            questions, by its place.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one with .jsonl or .txt files")
    files = sorted(folder.glob("*.jsonl"))
    if files:
        found = [read_scbench(path, limit) for path in files]
        return {name: asked for part in found for name, asked in part.items()}
    texts = read_documents(folder)
    table = _table_of(folder, texts)
    known = [name for name in texts if name in table]
    if not known:
        raise ValueError(
            f"{folder} has no questions for its texts; put a {TURNS} beside them, from a text's "
            "name to a list of questions"
        )
    return {name: (texts[name], table[name]) for name in known[:limit]}


def _table_of(folder: Path, texts: dict[str, str]) -> dict[str, list[Asked]]:
    path = folder / TURNS
    if not path.is_file():
        kinds = read_questions(folder, texts)
        return {
            name: [Asked(question) for question in asked.values()] for name, asked in kinds.items()
        }
    table = _json(path)
    if not isinstance(table, dict):
        raise ValueError(f"{path} is no table from a text's name to its questions; mend it")
    for name in table:
        if name not in texts:
            raise ValueError(
                f"{path} has questions for {name!r}, but there is no {name}.txt; add it"
            )
    return {name: questions_of(entry, f"{path}, {name}") for name, entry in table.items()}


def read_scbench(path: Path, limit: int | None = None) -> Documents:
    """The examples of one file.

    Raises:
        ValueError: a line without a context and two questions at least, by file and line.
    """
    found: Documents = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if limit is not None and len(found) >= limit:
            break
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); mend or delete it") from None
        context = row.get("context") if isinstance(row, dict) else None
        if not isinstance(context, str) or not context.strip():
            raise ValueError(f"{where} has no text in its field context; mend or delete it")
        asked = questions_of(row.get("multi_turns"), where)
        found[f"{path.stem}-{row.get('id', number)}"] = (context, asked)
    if not found:
        raise ValueError(f"{path} is empty; give a file with examples")
    return found


def read_questions_file(path: Path) -> list[Asked]:
    """The questions of one document: JSON, a list of questions or of {"question", "answers"}; or
    plain text, a question a line.

    Raises:
        ValueError: fewer than two questions, or one that is no text.
    """
    text = _text(path)
    if text.lstrip()[:1] in ("[", "{"):
        listed = _json(path)
        if isinstance(listed, dict):
            listed = listed.get("questions", listed.get("multi_turns"))
    else:
        listed = [line for line in text.splitlines() if line.strip()]
    return questions_of(listed, str(path))


def questions_of(listed: Any, where: str) -> list[Asked]:
    """The questions in a list of texts or of tables.

    Raises:
        ValueError: there are fewer than two, or one is no question.
    """
    if not isinstance(listed, list) or len(listed) < 2:
        raise ValueError(f"{where} needs a list of at least 2 questions; add some")
    return [_asked(entry, f"{where}, question {number}") for number, entry in enumerate(listed, 1)]


def _asked(entry: Any, where: str) -> Asked:
    table = entry if isinstance(entry, dict) else {"question": entry}
    question = next((table[name] for name in NAMED if name in table), None)
    answers: Any = next((table[name] for name in EXPECTED if table.get(name)), [])
    answers = answers if isinstance(answers, list) else [answers]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where} is no text; give a question or one with its answers")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"{where} has answers that are no text; mend or remove them")
    return Asked(question, tuple(answers))


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend it") from None


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the path of one with questions")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save it as plain text first") from None
