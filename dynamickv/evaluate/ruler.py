"""RULER's needle tasks, made here: prompts of a given length in tokens, in RULER's own columns or
kvpress's, for `longbench --data`.

The wording, what each task hides and the length that counts are RULER's (Hsieh et al. 2024,
arXiv:2404.06654): prompt and answer together fill the length. The texts around the needles are this
project's made-up sentences, or a folder of your own; RULER's own are essays that are not ours to
ship, so scores here are compared with each other, not with published ones.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dynamickv.evaluate.data import data_file
from dynamickv.evaluate.experiment import Row, key
from dynamickv.evaluate.haystack import Count, Haystack

DEPTHS = 40
"""Places, evenly spread from the start to the end, of which an essay's needles take some."""
COLUMNS = ("ruler", "kvpress")
"""Whose column names a file can have."""


@dataclass(frozen=True, slots=True)
class Made:
    """One example."""

    opening: str
    """What stands before the text, and the text."""
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    length: int
    """Tokens of the prompt, prefix included, and of the longest answer."""

    def row(self, columns: str, index: int, task: str, answer_length: int) -> Row:
        """As a line of a file, in RULER's columns or kvpress's."""
        prefix, answers = self.answer_prefix, list(self.answers)
        if columns == "ruler":
            text = f"{self.opening}\n{self.question}"
            return {
                "index": index,
                "input": text,
                "outputs": answers,
                "length": self.length,
                "answer_prefix": prefix,
            }
        return {
            "context": f"{self.opening}\n",
            "question": self.question,
            "answer_prefix": prefix,
            "answer": answers,
            "task": task,
            "max_new_tokens": answer_length,
        }


def ruler_tasks() -> list[str]:
    """The tasks that can be made."""
    return list(data_file("ruler_niah.json")["tasks"])


def make_examples(
    task: str,
    length: int,
    samples: int,
    count: Count,
    *,
    haystack: Haystack | None = None,
    seed: int = 0,
) -> Iterator[Made]:
    """So many different examples of a task; the same for the same arguments.

    Args:
        task: one of `ruler_tasks`.
        length: most tokens of prompt and answer together; as many are used as fit.
        count: tokens of a text.
        haystack: sentences around the needles of the tasks that RULER gives essays.

    Raises:
        ValueError: an unknown task, no samples, or a length without room for a text.
    """
    if task not in ruler_tasks():
        raise ValueError(f"there is no task {task!r}; choose from {', '.join(ruler_tasks())}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    sentences = haystack or Haystack()
    for sample in range(samples):
        rng = random.Random(key([seed, task, length, sample]))
        yield _example(task, length, count, sentences, rng)


def _example(task: str, length: int, count: Count, haystack: Haystack, rng: random.Random) -> Made:
    data = data_file("ruler_niah.json")
    plan = data["tasks"][task]
    answer_length = int(data_file("ruler.json")["niah"]["max_new_tokens"])
    keys = _different(lambda: _random(plan["keys"], rng), plan["needles"])
    values = _different(lambda: _random(plan["values"], rng), plan["needles"] * plan["per_key"])
    per_key = plan["per_key"]
    held = {name: values[at * per_key : (at + 1) * per_key] for at, name in enumerate(keys)}
    needles = [_needle(plan, name, value) for name in keys for value in held[name]]
    rng.shuffle(needles)
    asked = rng.sample(keys, plan["queries"])
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    kind, single = plan["values"], plan["queries"] * per_key == 1
    opening, question, prefix = (
        _worded(data[part], kind, query, single)
        for part in ("opening", "question", "answer_prefix")
    )
    answers = tuple(value for name in asked for value in held[name])
    filling = _filling(plan, length, count, haystack, rng, keys)
    places = _places(plan, len(needles), rng)

    def with_text(number: int) -> Made:
        text = _text(plan, filling[:number], needles, places)
        whole = f"{opening}{text}\n{question}{prefix}"
        used = count(whole) + answer_length
        return Made(f"{opening}{text}", question, prefix, answers, used)

    fewest = len(needles)
    made = with_text(fewest)
    if made.length > length:
        raise ValueError(
            f"{task} takes {made.length} tokens with its answer, so {length} leave no room for a "
            "text around it; choose a longer length"
        )
    low, high = fewest, len(filling)
    while low < high:
        middle = (low + high + 1) // 2
        tried = with_text(middle)
        if tried.length <= length:
            low, made = middle, tried
        else:
            high = middle - 1
    return made


def _worded(text: str, kind: str, query: str, single: bool) -> str:
    """In the singular, as RULER says it, where one value is asked for."""
    if single:
        kind = kind.removesuffix("s")
        for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
            text = text.replace(plural, singular)
    return text.format(kind=kind, query=query)


def _needle(plan: dict[str, Any], name: str, value: str) -> str:
    needle: str = data_file("ruler_niah.json")["needle"]
    return needle.format(kind=plan["values"], key=name, value=value)


def _filling(
    plan: dict[str, Any],
    length: int,
    count: Count,
    haystack: Haystack,
    rng: random.Random,
    keys: Sequence[str],
) -> list[str]:
    """More sentences than fit; other needles have none of the keys that are hidden."""
    if plan["haystack"] == "essay":
        return haystack.sentences(rng, 2 * length, count)
    if plan["haystack"] == "noise":
        noise = data_file("ruler_niah.json")["noise"]
        return [noise] * (2 * length // max(1, count(noise)) + 8)
    others = []
    held = 0
    while held < 2 * length:
        name = _random(plan["keys"], rng)
        if name not in keys:
            others.append(_needle(plan, name, _random(plan["values"], rng)))
            held += count(others[-1])
    return others


def _places(plan: dict[str, Any], number: int, rng: random.Random) -> list[float]:
    """Where needles go, ascending, 0 the start and 1 the end."""
    if plan["haystack"] == "essay":
        return sorted(place / (DEPTHS - 1) for place in rng.sample(range(DEPTHS), number))
    return sorted(rng.random() for _ in range(number))


def _text(
    plan: dict[str, Any], filling: Sequence[str], needles: Sequence[str], places: Sequence[float]
) -> str:
    parts = list(filling)
    for needle, place in zip(reversed(needles), reversed(places), strict=True):
        parts.insert(round(place * len(filling)), needle)
    return (" " if plan["haystack"] == "essay" else "\n").join(parts)


def _different(draw: Callable[[], str], number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found[draw()] = None
    return list(found)


def _random(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    words = data_file("ruler_niah.json")
    return f"{rng.choice(words['first'])}-{rng.choice(words['second'])}"


def lines(made: Sequence[Made], columns: str, task: str) -> str:
    """A file's text.

    Raises:
        ValueError: no such columns.
    """
    if columns not in COLUMNS:
        raise ValueError(f"columns must be one of {', '.join(COLUMNS)}, got {columns!r}")
    answer_length = int(data_file("ruler.json")["niah"]["max_new_tokens"])
    rows = [one.row(columns, index, task, answer_length) for index, one in enumerate(made)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
