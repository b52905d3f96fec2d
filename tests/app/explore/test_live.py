"""A run while it runs: events become cards and a status line."""

from __future__ import annotations

import pytest

import dynamickv as dkv
from app.explore.live import LiveRun
from app.serving.speed import Estimate, Speed
from tests.app.synthetic import synthetic_trace


def test_events_fill_the_cards() -> None:
    trace = synthetic_trace(tokens=300, capacity=40)
    live = LiveRun(["FullKV", "DynamicKV"], "Which?", 8, 30)
    live.add(dkv.Progress("prefill", 15, 30))
    assert live.status(1.0)["message"] == "Reading the prompt (prefill): layer 15 of 30"
    assert live.status(1.0)["done"] == 0.3
    for index, run in enumerate(trace.runs):
        event = dkv.Compressed(
            index, run.method, run.budgets, run.kept_fraction, run.kv_bytes, 0.01, 0.02
        )
        assert live.add(event)
    assert live.cards[0]["chip"] == "keeps everything"
    assert live.cards[1]["chip"] == "compressed at 30 of 30 layers"
    assert live.cards[1]["receipts"][1]["note"].startswith("of ")
    live.add(dkv.Token(1, "DynamicKV", 5, " The", 0.0))
    live.add(dkv.Token(1, "DynamicKV", 6, " The bank", 0.04))
    assert live.cards[1]["answer"] == [" The bank", "", ""]
    assert live.status(2.0)["message"] == "Answering (decode): token 2 of at most 8"
    live.add(dkv.RunFinished(1, trace.runs[1]))
    assert live.cards[1]["state"] == "done"
    live.add(dkv.ComparisonFinished(trace))
    assert live.trace is trace


def test_the_estimate_says_what_it_rests_on() -> None:
    speed = Speed.of(synthetic_trace(tokens=300), "the recorded run")
    estimate = speed.estimate(1000, 2, 64)
    dearer = speed.estimate(1000, 2, 64, mass=True)
    more = dearer.seconds - estimate.seconds
    assert more == pytest.approx(speed.prefill_per_token * 1000)
    assert estimate.words().startswith("up to ")
    assert estimate.words().endswith("at the speed of the recorded run")


def test_what_is_left_of_the_answers_is_judged_by_their_tokens() -> None:
    live = LiveRun(["FullKV", "SnapKV"], "?", 11, 30)
    live.add(dkv.Token(0, "FullKV", 5, "The", 0.0))
    assert live.status(40.0)["detail"] == "40.0 s"
    for _ in range(4):
        live.add(dkv.Token(0, "FullKV", 5, "The", 0.5))
        live.add(dkv.Token(1, "SnapKV", 5, "The", 0.5))
    assert live.status(44.0)["detail"] == "44.0 s · at most 6.0 s more"


def test_an_exceeded_estimate_is_said_to_be_exceeded() -> None:
    live = LiveRun(["FullKV"], "?", 8, 30, Estimate(seconds=11.2, origin="the last run here"))
    assert live.status(0)["detail"] == "0.0 s · up to 11.2 s, at the speed of the last run here"
    assert live.status(11.2)["detail"].startswith("11.2 s · up to 11.2 s")
    assert live.status(92)["detail"] == "92.0 s · longer than the estimated 11.2 s"
