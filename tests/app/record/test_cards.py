"""The answer cards: receipts, verdicts, and where answers part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.record.aligned_words import words_of
from app.record.cards import card, cards_payload, partings, verdicts
from app.record.words import finish_words
from dynamickv.record.trace import Divergence, Expected, Trace
from tests.app.synthetic import synthetic_trace


def test_card_marks_the_first_token_that_differs(trace: Trace) -> None:
    shown = card(trace.run("DynamicKV"), trace)
    assert shown["answer"] == [" The", " old", " bridge."]
    assert shown["chip"] == "compressed at 30 of 30 layers"
    rows = {row["label"]: (row["value"], row["note"]) for row in shown["receipts"]}
    assert rows["Token match"] == ("25 %", "differs at 2")
    assert rows["KV cache"][1].startswith("of ")


def test_the_cache_s_bytes_are_said_with_those_of_a_number(trace: Trace) -> None:
    run, model = trace.run("DynamicKV"), trace.model
    numbers = 2 * model.num_layers * model.num_kv_heads * model.head_dim * trace.prompt.length
    for each, said in ((4, ", 4 bytes a number"), (2, ", 2 bytes a number"), (3, "MiB")):
        shown = card(replace(run, kv_bytes_full=each * numbers), trace)
        notes = {row["label"]: row["note"] for row in shown["receipts"]}
        assert notes["KV cache"].endswith(said)


def test_without_fullkv_the_dashes_say_why(trace: Trace) -> None:
    run = replace(trace.run("DynamicKV"), aligned=None, agreement=None)
    shown = card(run, replace(trace, runs=[run]))
    rows = {row["label"]: (row["value"], row["note"]) for row in shown["receipts"]}
    assert rows["Survives"] == rows["Token match"] == ("\u2013", "no FullKV")


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


def test_cards_say_how_much_survives_and_which_word_is_lost(trace: Trace) -> None:
    rows = [{row["label"]: row for row in card(run, trace)["receipts"]} for run in trace.runs]
    assert [row["Survives"]["note"] for row in rows] == ["reference", "lost: northern"]
    assert rows[1]["Survives"]["value"] == "84 %"
    assert [row["Erased"]["value"] for row in rows] == ["0", f"{trace.runs[1].erased:,}"]
    old = replace(trace.runs[1], aligned=None, erased=None)
    notes = {row["label"]: row["note"] for row in card(old, trace)["receipts"]}
    assert (notes["Survives"], notes["Erased"]) == ("not recorded", "not recorded")


def test_words_carry_their_spaces_and_join_to_full_kvs_answer(trace: Trace) -> None:
    (found,) = words_of(trace)
    texts = [word["text"] for word in found["words"]]
    assert "".join(texts) == trace.runs[0].answer
    assert texts[found["loss"]] == " northern"
    lost = found["words"][1]
    assert (lost["full"], lost["here"], lost["instead"]) == ("95 %", "1.0 %", " old")
    assert words_of(replace(trace, runs=trace.runs[:1])) == []


def test_own_texts_are_judged_by_what_is_expected(trace: Trace) -> None:
    full, run = trace.runs
    runs = [replace(full, expected_found=True), replace(run, expected_found=False)]
    for span, said in (([20, 30], "is in the document"), (None, "is not in the document")):
        sought = Expected(text="northern bank", document_utf16_span=span)
        payload = cards_payload(replace(trace, runs=runs, expected=sought), "label")
        assert said in payload["expected"]
        assert [card["verdict"] for card in payload["cards"]] == [
            ["contains the expected answer"],
            ["misses the expected answer"],
        ]
    assert cards_payload(trace, "label")["expected"] == ""


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
    assert found["here"] == ["41 %", "0.01 %"]
    assert found["full"] == ["2.0 %", "90 %"]
    assert partings(trace) == []
