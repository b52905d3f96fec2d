"""A run while it runs: events become cards and a status line."""

from __future__ import annotations

import dynamickv as dkv
from app.live import LiveRun, Speed
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
    assert speed.estimate(1000, 2, 64).endswith("at the speed of the recorded run")
