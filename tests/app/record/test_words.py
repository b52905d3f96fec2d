"""A record in words: its runs' names, where it comes from, on what it was made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.record.cards import cards_payload
from app.record.words import circumstances, marked_words, run_names, source_label, version_words
from dynamickv.record.trace import Trace


def test_source_label_names_the_day(trace: Trace) -> None:
    assert source_label("recorded", trace.created) == "recorded on 23 November 2026"
    assert source_label("recorded", "not a date") == "recorded"


def test_a_second_run_of_a_method_says_what_differs(trace: Trace) -> None:
    run = trace.run("DynamicKV")
    again = replace(run, parameters=run.parameters | {"capacity": 64})
    assert run_names([*trace.runs, again, again]) == [
        ("FullKV", "FullKV"),
        ("DynamicKV", "DynamicKV"),
        ("What if", "DynamicKV, capacity 64"),
        ("What if", "DynamicKV, capacity 64"),
    ]
    marked = replace(run, parameters=run.parameters | {"pinned": [[3, 15]], "evicted": [[0, 1]]})
    assert run_names([run, marked])[1] == ("What if", "DynamicKV, 12 tokens pinned, 1 evicted")
    assert run_names([marked])[0] == ("DynamicKV", "DynamicKV, 12 tokens pinned, 1 evicted")
    assert run_names([run, replace(run)])[1] == ("What if", "DynamicKV, again")


@pytest.mark.parametrize("spans", [7, "x", None, [3], [[1, 2, 3]], [["a", "b"]], {}, [[9, 2]]])
def test_spans_of_a_strange_record_are_no_words(trace: Trace, spans: object) -> None:
    run = replace(trace.run("DynamicKV"), parameters={"pinned": spans})
    assert marked_words(run) == ""


def test_circumstances_name_model_versions_and_commit(trace: Trace) -> None:
    words = circumstances(trace)
    assert words == (
        "synthetic-model, revision none, float32 on cpu, exact products, attention sdpa, "
        "dynamickv 0.1.0"
    )
    versions = {"dynamickv": "0.2.0", "commit": "0123456789abcdef" * 4, "torch": "2.13.0+cpu"}
    assert version_words(versions) == "torch 2.13.0+cpu, dynamickv 0.2.0 (commit 01234567)"
    assert cards_payload(trace, "here")["circumstances"] == words
    assert len(version_words({"torch": "x" * 10_000, "commit": "<b>" * 999})) < 100
