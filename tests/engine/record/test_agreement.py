"""How far one answer follows another."""

from __future__ import annotations

import random

import pytest

from dynamickv.record.agreement import rouge_l


def longest_common(first: list[str], second: list[str]) -> int:
    """The textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, ours in enumerate(first):
        for j, theirs in enumerate(second):
            same = table[i][j] + 1 if ours == theirs else 0
            table[i + 1][j + 1] = max(same, table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize("seed", range(20))
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(seed: int) -> None:
    chance = random.Random(seed)
    ours, theirs = (
        [chance.choice("abcd") for _ in range(chance.randrange(1, 90))] for _ in range(2)
    )
    common = longest_common(ours, theirs)
    precision, recall = common / len(ours), common / len(theirs)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the pier was green", "the pier was green", 1.0),
        ("the  pier\nwas green", "the pier was green", 1.0),
        ("", "", 1.0),
        ("", "green", 0.0),
        ("green", " .\n", 0.0),
        ("...", "green", 0.0),
        ("\u3000.", "green", 0.0),
        ("was it green", "it was green", 2 / 3),
        ("a b", "b", 2 / 3),
    ],
)
def test_rouge_l_of_short_and_odd_texts(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_answers_of_thousands_of_words_are_compared() -> None:
    first = " ".join(str(number % 97) for number in range(8000))
    second = " ".join(str(number % 89) for number in range(8000))
    assert 0.5 < rouge_l(first, second) < 1
