"""What all events share: the address that a visitor sees."""

from __future__ import annotations

import pytest

from app.serving.events import seen_at


class Seen:
    """A request as a browser sends it."""

    def __init__(self, origin: str) -> None:
        self.request = True
        self.headers = {"origin": origin}


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://someone-explorer.hf.space", "https://someone-explorer.hf.space"),
        ("http://127.0.0.1:7860", "http://127.0.0.1:7860"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("null", ""),
        ("http://a.b/'; rm -rf ~; '", ""),
        ("http://a.b\n", ""),
        ("", ""),
    ],
)
def test_snippets_name_the_address_the_visitor_sees(origin: str, expected: str) -> None:
    assert seen_at(Seen(origin)) == expected  # type: ignore[arg-type]
