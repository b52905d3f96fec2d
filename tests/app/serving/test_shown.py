"""A record on the page: whose expected facts its answers are held against."""

from __future__ import annotations

from dataclasses import replace

from app.examples import Example
from app.serving.model_host import ModelHost
from tests.app.pages import Page


def test_the_expected_answer_is_looked_for_in_the_example_s_own_record_only(
    host: ModelHost, example: Example
) -> None:
    trace = example.trace
    assert trace is not None
    expecting = replace(example, expected=("the OLD bridge",))
    shown = Page(host, {"one": expecting}).shown
    cards, _ = shown.example(expecting)
    assert [card["verdict"] for card in cards["cards"]] == [
        ["misses the expected answer"],
        ["contains the expected answer"],
    ]
    asked = replace(trace, prompt=replace(trace.prompt, question="And who?"))
    read = replace(
        trace, prompt=replace(trace.prompt, text=trace.prompt.text.replace("river", "ocean"))
    )
    for other in (asked, read):
        cards, _ = shown.record(other, "file", "key")
        assert [card["verdict"] for card in cards["cards"]] == [[], []]
    cards, _ = Page(host, {"one": example}).shown.example(example)
    assert [card["verdict"] for card in cards["cards"]] == [[], []]
