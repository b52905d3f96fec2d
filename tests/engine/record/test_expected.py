"""What is expected, found in a text or not."""

from __future__ import annotations

import pytest

from dynamickv.record.expected import find_expected, require_expected


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("the old GOOSE flew", "goose", "GOOSE"),
        ("behind the\npainting  of a goose", " painting of\ta goose ", "painting  of a goose"),
        ("built in 1947", "9", None),
        ("a mongoose", "goose", None),
        ("(goose)", "goose", "goose"),
        ("\u6c34\u4ed9\u8336\u5f88\u597d", "\u8336\u5f88", "\u8336\u5f88"),
        ("costs $4.50 now", "$4.50", "$4.50"),
        ("a.c", "a+c", None),
        ("anything", "  ", None),
    ],
)
def test_expected_words_are_found_whole_without_case_and_spacing(
    text: str, expected: str, found: str | None
) -> None:
    span = find_expected(text, expected)
    assert (None if span is None else text[slice(*span)]) == found


@pytest.mark.parametrize("value", [None, 5, ["a"], "a" * (2**16 + 1)])
def test_what_cannot_be_looked_for_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="what is expected"):
        require_expected(value)
