"""Payloads: what the browser receives says what the record says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from app.explore import view_model as vm
from app.views import render_figures
from dynamickv.record.trace import Divergence, Trace
from tests.app.synthetic import synthetic_trace


def decoded_offsets(starts: list[int], ends: list[list[int]], length: int) -> list[list[int]]:
    """What core.js does with the deltas."""
    absolute, at = [], 0
    for delta in starts:
        at += delta
        absolute.append(at)
    ended = [*absolute[1:], 0]
    for index, end in ends:
        ended[index] = end
    return [[start, end] for start, end in zip(absolute, ended, strict=True)][:length]


@pytest.mark.parametrize(
    "offsets",
    [
        [[0, 3], [3, 4], [4, 9]],
        [[0, 2], [0, 2], [0, 2], [2, 5]],  # one emoji over three tokens
        [[0, 0], [0, 4], [6, 7]],  # an empty token, and a gap
        [[5, 6]],
    ],
)
def test_offsets_survive_the_journey(offsets: list[list[int]]) -> None:
    assert decoded_offsets(*vm.encode_offsets(offsets), len(offsets)) == offsets


def test_payload_is_one_json_string_and_holds_the_whole_record(trace: Trace) -> None:
    payload = json.loads(vm.dumps(vm.trace_payload(trace, "label", render_figures(trace))))
    record = payload["record"]
    record["prompt"]["text_utf16_offsets"] = decoded_offsets(
        payload["starts"], payload["ends"], trace.prompt.length
    )
    # What keeps everything travels without its bits; the page writes them into the file it saves.
    assert [bool(run["retained"]["bits"]) for run in record["runs"]] == [False, True]
    record["runs"][0]["retained"]["bits"] = trace.runs[0].retained.bits
    assert Trace.from_dict(record) == trace


def test_payload_of_8k_tokens_stays_small() -> None:
    trace = synthetic_trace(tokens=11_000)
    assert trace.prompt.length > 7_900
    size = len(vm.dumps(vm.trace_payload(trace, "label", render_figures(trace))))
    assert size / len(trace.runs) < 250_000


def test_card_marks_the_first_token_that_differs(trace: Trace) -> None:
    card = vm.card(trace.run("DynamicKV"), trace)
    assert card["answer"] == [" The", " old", " bridge."]
    assert card["chip"] == "compressed at 30 of 30 layers"
    rows = {row["label"]: (row["value"], row["note"]) for row in card["receipts"]}
    assert rows["Token match"] == ("25 %", "differs at 2")
    assert rows["KV cache"][1].startswith("of ")


def test_fullkv_card_is_the_reference(trace: Trace) -> None:
    card = vm.card(trace.run("FullKV"), trace)
    assert card["chip"] == "keeps everything"
    assert card["answer"] == [trace.run("FullKV").answer, "", ""]


def test_a_prompt_that_fits_is_said_loudly() -> None:
    trace = synthetic_trace(tokens=60, capacity=512)
    payload = vm.cards_payload(trace, "label")
    assert payload["notice"].startswith("Nothing to compress")
    assert payload["cards"][1]["chip"] == "nothing to compress: the prompt fits"
    assert payload["cards"][1]["tone"] == "loud"


def test_a_stopped_answer_says_so(trace: Trace) -> None:
    run = replace(trace.run("DynamicKV"), finish_reason="cancelled")
    assert vm.card(run, trace)["state"] == "stopped"
    assert vm.finish_words(run) == "stopped after 4 tokens"


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
    payload = vm.cards_payload(trace, "label", found)
    assert [card["verdict"] for card in payload["cards"]] == said
    assert [card["verdict"] for card in vm.cards_payload(trace, "label")["cards"]] == [[], []]


def test_a_stopped_answer_is_not_called_wrong(trace: Trace) -> None:
    runs = [replace(run, finish_reason="cancelled") for run in trace.runs]
    assert vm.verdicts(runs, [[False], [False, False]]) == [[], []]
    assert vm.verdicts(runs, [[False], [True]]) == [[], ["contains the expected answer"]]


def test_numbers_read_well() -> None:
    assert [vm.percent(x) for x in (0.0371, 0.5, 1.0, 0.9996)] == [
        "3.7 %",
        "50 %",
        "100 %",
        "100 %",
    ]
    assert [vm.mebibytes(x * vm.MIB) for x in (0.25, 5.61, 241)] == [
        "0.25 MiB",
        "5.6 MiB",
        "241 MiB",
    ]
    assert [vm.seconds(x) for x in (6.34, 0.0042, 0.031)] == ["6.3 s", "4.2 ms", "31 ms"]
    assert vm.count(1, "token") == "1 token"


def test_capacity_is_given_in_percent_and_mebibytes() -> None:
    model = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "bytes_per_value": 4}
    assert vm.capacity_line(model, 128, 3412) == "3.8 % of the prompt · about 5.6 of 150 MiB"


def test_source_label_names_the_day(trace: Trace) -> None:
    assert vm.source_label("recorded", trace.created) == "recorded on 23 November 2026"
    assert vm.source_label("recorded", "not a date") == "recorded"


def test_file_name_is_safe(trace: Trace) -> None:
    hostile = replace(trace, model=replace(trace.model, name="../../etc/pass wd<é>"))
    name = vm.run_file_name(hostile)
    assert name.endswith("_b96_2026-11-23.json.gz")
    assert not set(name) & set("/ <>é\\")


def test_payload_of_32k_tokens_stays_within_half_a_megabyte_per_method() -> None:
    trace = synthetic_trace(tokens=45_400, capacity=512)
    assert trace.prompt.length > 32_768
    size = len(vm.dumps(vm.trace_payload(trace, "label", render_figures(trace))))
    assert size / len(trace.runs) < 500_000


def test_a_second_run_of_a_method_says_what_differs(trace: Trace) -> None:
    run = trace.run("DynamicKV")
    again = replace(run, parameters=run.parameters | {"capacity": 64})
    assert vm.run_names([*trace.runs, again, again]) == [
        ("FullKV", "FullKV"),
        ("DynamicKV", "DynamicKV"),
        ("What if", "DynamicKV, capacity 64"),
        ("What if", "DynamicKV, capacity 64"),
    ]
    marked = replace(run, parameters=run.parameters | {"pinned": [[3, 15]], "evicted": [[0, 1]]})
    assert vm.run_names([run, marked])[1] == ("What if", "DynamicKV, 12 tokens pinned, 1 evicted")
    assert vm.run_names([marked])[0] == ("DynamicKV", "DynamicKV, 12 tokens pinned, 1 evicted")
    assert vm.run_names([run, replace(run)])[1] == ("What if", "DynamicKV, again")


@pytest.mark.parametrize("spans", [7, "x", None, [3], [[1, 2, 3]], [["a", "b"]], {}, [[9, 2]]])
def test_spans_of_a_strange_record_are_no_words(trace: Trace, spans: object) -> None:
    run = replace(trace.run("DynamicKV"), parameters={"pinned": spans})
    assert vm.marked_words(run) == ""


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
    (found,) = vm.partings(both)
    assert (found["at"], found["shared"]) == (2, " The")
    assert found["tokens"] == [" old", "token 8"]
    assert found["here"] == ["41 %", "< 0.1 %"]
    assert found["full"] == ["2.0 %", "90 %"]
    assert vm.partings(trace) == []


def test_circumstances_name_model_versions_and_commit(trace: Trace) -> None:
    words = vm.circumstances(trace)
    assert words == (
        "synthetic-model, revision none, float32 on cpu, attention sdpa, dynamickv 0.1.0"
    )
    versions = {"dynamickv": "0.2.0", "commit": "0123456789abcdef" * 4, "torch": "2.13.0+cpu"}
    assert vm.version_words(versions) == "torch 2.13.0+cpu, dynamickv 0.2.0 (commit 01234567)"
    assert vm.cards_payload(trace, "here")["circumstances"] == words
    assert len(vm.version_words({"torch": "x" * 10_000, "commit": "<b>" * 999})) < 100
