"""RULER's needle tasks as they are made here: what is hidden, how it is asked, how long it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dynamickv.evaluate.datasets import read_tasks
from dynamickv.evaluate.ruler import Made, lines, make_examples, ruler_tasks
from tests.evaluate.test_commands import Command, call  # noqa: F401

ANSWER = 128


def words(text: str) -> int:
    """A tokenizer without files: words and signs."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def made(task: str, length: int = 700, samples: int = 3, **other: int) -> list[Made]:
    return list(make_examples(task, length, samples, words, **other))


@pytest.mark.parametrize("task", ruler_tasks())
def test_prompt_and_answer_fill_the_length_and_no_more(task: str) -> None:
    for one in made(task):
        whole = f"{one.opening}\n{one.question}{one.answer_prefix}"
        assert one.length == words(whole) + ANSWER
        longest = max(words(line) for line in re.split(r"\n|(?<=\.) ", one.opening)[1:])
        assert 700 - 2 * longest - 8 <= one.length <= 700


@pytest.mark.parametrize("task", ruler_tasks())
def test_every_answer_stands_in_the_text_once_beside_its_key(task: str) -> None:
    for one in made(task):
        asked = re.search(r"for (.*) mentioned", one.question)
        assert asked is not None
        for answer in one.answers:
            (key,) = re.findall(rf"for (\S+) is: {answer}\.", one.opening)
            assert key in asked[1]
            assert one.opening.count(answer) == 1


@pytest.mark.parametrize(
    ("task", "answers", "needles"),
    [
        ("niah_single_1", 1, 1),
        ("niah_multikey_1", 1, 4),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_a_task_hides_and_asks_as_many_as_rulers(task: str, answers: int, needles: int) -> None:
    for one in made(task):
        assert len(set(one.answers)) == answers
        assert one.opening.count("One of the special magic numbers for") == needles


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_around_the_needle_are_other_needles_with_other_keys(task: str) -> None:
    for one in made(task):
        keys = re.findall(r"for (\S+) is: ", one.opening)
        asked = re.search(r"for (\S+) mentioned", one.question)
        assert asked is not None
        assert len(keys) > 10
        assert keys.count(asked[1]) == 1


def test_one_value_is_asked_for_in_the_singular_as_ruler_does() -> None:
    one = made("niah_single_2", samples=1)[0]
    assert one.opening.startswith("A special magic number is hidden within the following text.")
    assert one.question.startswith("What is the special magic number for ")
    assert one.answer_prefix.endswith(" mentioned in the provided text is")
    several = made("niah_multiquery", samples=1)[0]
    assert several.question.startswith("What are all the special magic numbers for ")
    assert several.question.count(",") == 3
    assert ", and " in several.question


def test_the_same_seed_makes_the_same_and_another_seed_another() -> None:
    first, again, other = (
        made("niah_multikey_3"),
        made("niah_multikey_3"),
        made("niah_multikey_3", seed=1),
    )
    assert first == again
    assert not {one.answers for one in first} & {one.answers for one in other}
    assert len({one.answers for one in first}) == len(first)


@pytest.mark.parametrize("columns", ["ruler", "kvpress"])
def test_both_kinds_of_files_are_read_as_one_prompt(columns: str, tmp_path: Path) -> None:
    examples = made("niah_single_3")
    text = lines(examples, columns, "niah_single_3")
    (tmp_path / "niah_single_3.jsonl").write_text(text, encoding="utf-8")
    for one, read in zip(examples, read_tasks(tmp_path), strict=True):
        assert read.fields["input"] == f"{one.opening}\n{one.question}{one.answer_prefix}"
        assert read.answers == list(one.answers)


def test_what_cannot_be_made_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="there is no task 'niah'; choose from niah_single_1"):
        made("niah")
    with pytest.raises(ValueError, match="200 leave no room for a text around it"):
        made("niah_multiquery", length=200)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        made("niah_single_1", samples=0)


def test_the_command_writes_a_file_per_task_and_says_the_real_lengths(
    call: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    arguments = ("--tasks", "niah_single_1,niah_multikey_1", "--lengths", "900", "--samples", "2")
    code, out, err = call("ruler", *arguments, "--output", "made")
    assert code == 0, err
    rows = [json.loads(row) for row in (tmp_path / "made/900/niah_multikey_1.jsonl").open()]
    assert [row["index"] for row in rows] == [0, 1]
    lengths = [row["length"] for row in rows]
    assert f"{min(lengths)} to {max(lengths)}" in out
    assert max(lengths) <= 900
    code, out, err = call("ruler", "--tasks", "qa_1")
    assert code == 2
    assert "there is no task 'qa_1'" in err
