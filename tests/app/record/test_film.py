"""The film of a record: what every run held after each layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

import dynamickv as dkv
import dynamickv.walk
from app.record.film import film_of, held_by_step
from app.record.payload import trace_payload
from tests.app.synthetic import synthetic_trace
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm


def test_a_film_ends_with_what_the_record_holds() -> None:
    trace = synthetic_trace()
    full, ours = film_of(trace)
    assert full is None
    assert ours is not None
    assert [len(step) for step in ours] == list(range(1, 31))
    assert ours[-1] == trace.run("DynamicKV").budgets


@pytest.mark.parametrize("method", ["DynamicKV", "LAVa", "ShiftKV"])
def test_the_film_says_what_was_held_while_the_prompt_was_read(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamickv.walk, "SHARE", 100.0)  # everything is told at once
    methods = [dkv.METHODS[method](capacity=40)]
    held: dict[int, int] = {}
    steps: list[list[int]] = []
    for event in dkv.compare_stream(
        tiny_llm(), DOCUMENT, QUESTION, methods=methods, max_new_tokens=1, watch=True
    ):
        if isinstance(event, dkv.Progress) and event.completed:
            steps.append([held[layer] for layer in sorted(held)])
        elif isinstance(event, dkv.LayerKept):
            held[event.layer] = event.budget
        elif isinstance(event, dkv.ComparisonFinished):
            trace = event.trace
    assert held_by_step(trace.runs[0], trace) == steps


@pytest.mark.parametrize(("method", "alone"), [("CAKE", True), ("LAVa", False)])
def test_a_record_that_has_the_last_budgets_alone_says_so(method: str, alone: bool) -> None:
    methods = [dkv.METHODS[method](capacity=40)]
    trace = dkv.compare(tiny_llm(), DOCUMENT, QUESTION, methods=methods, max_new_tokens=1)
    assert trace_payload(trace, "now")["looks"][0]["endsAlone"] is alone


@pytest.mark.parametrize(
    "changes", [{"r_max": "10"}, {"r_max": float("nan")}, {"capacity": 10**9}, {"r_max": 1e300}]
)
def test_strange_parameters_leave_the_budgets(changes: dict[str, object]) -> None:
    trace = synthetic_trace()
    run = trace.run("DynamicKV")
    strange = replace(run, parameters={**run.parameters, "r_max": 10.0, **changes})
    film = held_by_step(strange, trace)
    assert film is not None
    assert film[-1] == run.budgets
