"""The answer cards: receipts, verdicts, and where answers part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.record.cards import card, cards_payload, partings, verdicts
from app.record.words import finish_words
from dynamickv.record.trace import Divergence, Trace
from tests.app.synthetic import synthetic_trace


def test_card_marks_the_first_token_that_differs(trace: Trace) -> None:
    shown = card(trace.run("DynamicKV"), trace)
    assert shown["answer"] == [" The", " old", " bridge."]
    assert shown["chip"] == "compressed at 30 of 30 layers"
    rows = {row["label"]: (row["value"], row["note"]) for row in shown["receipts"]}
    assert rows["Token match"] == ("25 %", "differs at 2")
    assert rows["KV cache"][1].startswith("of ")


def test_fullkv_card_is_the_reference(trace: Trace) -> None:
    shown = card(trace.run("FullKV"), trace)
    assert shown["chip"] == "keeps everything"
    assert shown["answer"] == [trace.run("FullKV").answer, "", ""]


def test_a_prompt_that_fits_is_said_loudly() -> None:
    trace = synthetic_trace(tokens=60, capacity=512)
    payload = cards_payload(trace, "label")
    assert payload["notice"].startswith("Nothing to compress")
    assert payload["cards"][1]["chip"] == "nothing to compress: the prompt fits"
    assert payload["cards"][1]["tone"] == "loud"


def test_a_stopped_answer_says_so(trace: Trace) -> None:
    run = replace(trace.run("DynamicKV"), finish_reason="cancelled")
    assert card(run, trace)["state"] == "stopped"
    assert finish_words(run) == "stopped after 4 tokens"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([[True], [True]], [["contains the expected answer"]] * 2),
        ([[True], [False]], [["contains the expected answer"], ["misses the expected answer"]]),
        (
            [[False], [False]],
            [
                ["misses the expected answer"],
                ["misses the expected answer", "FullKV is also wrong here"],
            ],
        ),
        (
            [[True, True, False], [False, True, False]],
            [
                ["holds 2 of 3 expected facts"],
                ["holds 1 of 3 expected facts", "FullKV is also wrong here"],
            ],
        ),
        (
            [[True, True], [True, False]],
            [["holds 2 of 2 expected facts"], ["holds 1 of 2 expected facts"]],
        ),
    ],
)
def test_cards_say_whether_the_expected_answer_is_there(
    trace: Trace, found: list[list[bool]], said: list[list[str]]
) -> None:
    payload = cards_payload(trace, "label", found)
    assert [card["verdict"] for card in payload["cards"]] == said
    assert [card["verdict"] for card in cards_payload(trace, "label")["cards"]] == [[], []]


def test_a_stopped_answer_is_not_called_wrong(trace: Trace) -> None:
    runs = [replace(run, finish_reason="cancelled") for run in trace.runs]
    assert verdicts(runs, [[False], [False, False]]) == [[], []]
    assert verdicts(runs, [[False], [True]]) == [[], ["contains the expected answer"]]


def test_partings_show_both_tokens_and_their_probabilities(trace: Trace) -> None:
    run = trace.run("DynamicKV")
    assert run.agreement is not None
    divergence = Divergence(
        token_ids=[7, 8],
        pieces=[" old", ""],
        probabilities=[0.41, 0.0001],
        probabilities_full=[0.02, 0.9],
    )
    agreed = replace(run.agreement, divergence=divergence)
    both = replace(trace, runs=[trace.runs[0], replace(run, agreement=agreed)])
    (found,) = partings(both)
    assert (found["at"], found["shared"]) == (2, " The")
    assert found["tokens"] == [" old", "token 8"]
    assert found["here"] == ["41 %", "< 0.1 %"]
    assert found["full"] == ["2.0 %", "90 %"]
    assert partings(trace) == []
