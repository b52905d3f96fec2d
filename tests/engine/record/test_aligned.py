"""An answer's tokens joined to words, and the word that carries a loss."""

from __future__ import annotations

import pytest

from dynamickv.record.aligned import Forced, aligned, word_lost, word_tokens


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["The", " key", " to"], ["The", "key", "to"]),
        ([" O", "st", "erm", "ark", " is"], ["Ostermark", "is"]),
        (["tower", ".", "\n\n", "It"], ["tower", ".", "It"]),
        (["don", "'t", " well", "-", "known"], ["don't", "well-known"]),
        (["3", ".", "5", " km", ")", "."], ["3.5", "km", ")", "."]),
        (["\u6e2f", "\u53e3", "\u3002", "A", "B"], ["\u6e2f", "\u53e3", "\u3002", "AB"]),
        (
            [" \u0441\u043b", "\u043e\u0432\u043e", " \u0434\u0430"],
            ["\u0441\u043b\u043e\u0432\u043e", "\u0434\u0430"],
        ),
        ([" a", "", "", "\U0001f327", " b", ""], ["a", "\U0001f327", "b"]),
        (["", "yes"], ["yes"]),
        (["(a)", " b"], ["(a)", "b"]),
        (["_init", "_", "x", "("], ["_init_x", "("]),
        ([""], []),
        ([" ", "\n"], []),
        ([], []),
    ],
)
def test_tokens_join_to_words(pieces: list[str], words: list[str]) -> None:
    spans = word_tokens(pieces)
    assert ["".join(pieces[first:last]).strip() for first, last in spans] == words
    ends = [0, *(end for span in spans for end in span)]
    assert ends == sorted(ends)


def test_a_token_that_completes_no_character_goes_with_the_next() -> None:
    assert word_tokens([" a", "", "\U0001f327"]) == [(0, 1), (1, 3)]


@pytest.mark.parametrize(
    ("here", "full", "lost"),
    [
        ([0.9, 0.005, 0.7], [0.9, 0.987, 0.6], 1),
        # A doubtful word that loses much of little is not the one.
        ([0.001, 0.3], [0.05, 0.9], 1),
        # Half of it survives: reworded, not lost.
        ([0.5, 0.8], [0.9, 0.9], None),
        ([0.1, 0.1], [0.9, 0.9], 0),
        ([1.0], [0.2], None),
    ],
)
def test_the_loss_is_carried_by_the_word_that_falls_most(
    here: list[float], full: list[float], lost: int | None
) -> None:
    assert word_lost(here, full) == lost


def test_a_word_has_the_product_of_its_tokens_and_the_first_one_that_differs() -> None:
    pieces = ["The", " \U0001f327", " go", "ose", ".", ""]
    ids = [1, 2, 3, 4, 5, 6]
    full = Forced(
        probabilities=[0.5, 1.0, 0.8, 0.5, 0.9, 0.1],
        likeliest=ids,
        likeliest_probabilities=[0.5] * 6,
    )
    own = Forced(
        probabilities=[0.6, 1.0, 0.4, 0.1, 0.45, 0.9],
        likeliest=[1, 2, 3, 9, 5, 9],
        likeliest_probabilities=[0.6, 1.0, 0.4, 0.7, 0.45, 0.9],
    )
    found = aligned(pieces, ids, full, own, [" a", " b", " c", " clock", " d", " e"])
    assert found is not None
    assert found.utf16_spans == [[0, 3], [4, 6], [7, 12], [12, 13]]
    assert found.token_spans == [[0, 1], [1, 2], [2, 4], [4, 5]]
    assert found.probabilities == pytest.approx([0.6, 1.0, 0.04, 0.45])
    assert found.probabilities_full == pytest.approx([0.5, 1.0, 0.4, 0.9])
    assert found.instead == ["", "", " clock", ""]
    assert found.instead_probabilities == [0.0, 0.0, 0.7, 0.0]
    assert found.shares == pytest.approx([1.0, 1.0, 0.1, 0.5])
    assert found.surviving == pytest.approx(0.65)
    assert found.loss == 2
