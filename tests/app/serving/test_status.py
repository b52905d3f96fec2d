"""The status line: sentences, and a place in the queue."""

from __future__ import annotations

import pytest

from app.serving.status import sentence_of, waiting
from app.serving.turns import Place


def test_sentences_end_like_sentences() -> None:
    assert sentence_of(ValueError("capacity must exceed 8")) == "Capacity must exceed 8."
    assert sentence_of(KeyError()) == "KeyError."


def test_sentences_call_the_form_s_numbers_as_it_does() -> None:
    for error, sentence in (
        (
            "capacity must exceed window_size=8 tokens, got 8",
            "Capacity must exceed Window size 8 tokens, got 8.",
        ),
        ("kernel_size must be odd, got 4", "Kernel size must be odd, got 4."),
        ("decode_buffer must be 1", "Decode buffer must be 1."),
        ("window_size.txt is a folder", "window_size.txt is a folder."),
    ):
        assert sentence_of(ValueError(error)) == sentence


@pytest.mark.parametrize(
    ("ahead", "seconds", "words"),
    [
        (1, None, ""),
        (1, 8.0, "about 8.0 s, judging by the last runs"),
        (1, 0.0, "longer than estimated, judging by the last runs"),
        (0, 0.0, ""),
    ],
)
def test_a_place_in_the_queue_is_told_with_its_time(
    ahead: int, seconds: float | None, words: str
) -> None:
    assert waiting(Place(ahead=ahead, seconds=seconds))["detail"] == words
