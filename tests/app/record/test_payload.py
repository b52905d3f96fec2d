"""Payloads: what the browser receives says what the record says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from app.components import dumps
from app.record.payload import encode_offsets, run_file_name, trace_payload
from app.views import render_figures
from dynamickv.record.trace import Trace
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
    assert decoded_offsets(*encode_offsets(offsets), len(offsets)) == offsets


def test_payload_is_one_json_string_and_holds_the_whole_record(trace: Trace) -> None:
    payload = json.loads(dumps(trace_payload(trace, "label", render_figures(trace))))
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
    size = len(dumps(trace_payload(trace, "label", render_figures(trace))))
    assert size / len(trace.runs) < 250_000


def test_file_name_is_safe(trace: Trace) -> None:
    hostile = replace(trace, model=replace(trace.model, name="../../etc/pass wd<é>"))
    name = run_file_name(hostile)
    assert name.endswith("_b96_2026-11-23.json.gz")
    assert not set(name) & set("/ <>é\\")


def test_payload_of_32k_tokens_stays_within_half_a_megabyte_per_method() -> None:
    trace = synthetic_trace(tokens=45_400, capacity=512)
    assert trace.prompt.length > 32_768
    size = len(dumps(trace_payload(trace, "label", render_figures(trace))))
    assert size / len(trace.runs) < 500_000
