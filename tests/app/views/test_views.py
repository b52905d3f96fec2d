"""Every registered view draws a record, in the words and shapes the browser can take."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import dynamickv as dkv
from app.theme import css_variables, method_style
from app.views import VIEWS, Figure, View, render_figures
from app.views import budgets as budgets_view
from app.views.base import blank_figure
from app.views.depth import kept_by_part
from dynamickv.record.trace import Trace
from tests.app.synthetic import synthetic_trace
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

KNOWN_TRACES = {"bar", "scatter", "heatmap", "histogram"}
TOY = View(key="toy", title="Toy", render=lambda trace: Figure(plot=blank_figure(200), height=200))


@pytest.fixture
def toy_view(monkeypatch: pytest.MonkeyPatch) -> View:
    monkeypatch.setitem(VIEWS, TOY.key, TOY)
    return TOY


@pytest.mark.parametrize("view", VIEWS.values(), ids=lambda view: view.key)
@pytest.mark.parametrize(
    "methods", [("FullKV", "DynamicKV"), ("FullKV", "SnapKV", "DynamicKV"), ("FullKV",)]
)
def test_every_view_renders_a_record(view: View, methods: tuple[str, ...]) -> None:
    figure = view.render(synthetic_trace(tokens=300, capacity=40, methods=methods)).to_json()
    json.dumps(figure, allow_nan=False)
    assert figure["height"] == figure["layout"]["height"]
    assert {trace["type"] for trace in figure["data"]} <= KNOWN_TRACES
    assert "template" not in figure["layout"] or not figure["layout"]["template"]
    assert figure["layout"]["uirevision"]


def test_a_registered_view_reaches_the_page(toy_view: View, trace: Trace) -> None:
    assert toy_view.key in render_figures(trace)


def test_bars_show_window_and_budget(trace: Trace) -> None:
    figure = budgets_view.render(trace).to_json()
    window, chosen = figure["data"][2], figure["data"][3]
    assert window["meta"] == chosen["meta"] == "DynamicKV"
    assert set(window["x"]) == {16}
    totals = [a + b for a, b in zip(window["x"], chosen["x"], strict=True)]
    assert totals == trace.run("DynamicKV").budgets
    assert (
        figure["layout"]["yaxis"]["range"][0] > figure["layout"]["yaxis"]["range"][1]
    )  # layer 0 on top


def test_film_has_every_update_and_ends_at_the_result(trace: Trace) -> None:
    run = trace.run("DynamicKV")
    steps = budgets_view.render(trace).steps
    assert len(steps) == len(run.budget_history) + 1
    assert steps[0].label == f"update 1 of {len(run.budget_history)}"
    assert steps[0].x[3][: len(run.budget_history[0])] == run.budget_history[0]
    assert steps[0].x[3][len(run.budget_history[0]) :] == [0] * (30 - len(run.budget_history[0]))
    assert [a + b for a, b in zip(steps[-1].x[2], steps[-1].x[3], strict=True)] == run.budgets


def test_the_film_says_whose_it_is_and_is_of_the_run_added_last(trace: Trace) -> None:
    run = trace.run("DynamicKV")
    first = budgets_view.render(trace).steps
    assert first[0].note.startswith("DynamicKV, after layer")
    assert first[-1].note.startswith("DynamicKV: ")
    added = replace(run, parameters={**run.parameters, "window_size": 4})
    both = budgets_view.render(replace(trace, runs=[*trace.runs, added])).steps
    assert both[-1].note.startswith("DynamicKV, window size 4: ")
    assert both[-1].note.endswith("plus a window of 4")


def test_every_method_has_its_colour_on_the_page() -> None:
    light, _, dark = css_variables().partition(".dark {")
    for name in dkv.METHODS:
        style = method_style(name)
        assert f'[data-method="{name}"] {{ --method: {style.light}; }}' in light
        assert f'[data-method="{name}"] {{ --method: {style.dark}; }}' in dark


def test_a_record_without_updates_has_no_film() -> None:
    assert budgets_view.render(synthetic_trace(methods=("FullKV", "SnapKV"))).steps == []


def test_full_cache_is_kept_everywhere_along_the_document(trace: Trace) -> None:
    assert kept_by_part(trace.run("FullKV"), trace) == [1.0] * 20


def test_the_film_shares_the_whole_budget_at_every_update() -> None:
    methods = [dkv.FullKV(), dkv.DynamicKV(capacity=40, update_interval=2)]
    trace = dkv.compare(tiny_llm(), DOCUMENT, QUESTION, methods=methods, max_new_tokens=1)
    *updates, result = VIEWS["budgets"].render(trace).steps
    total = (40 - 8) * trace.model.num_layers
    assert len(updates) == 3
    for update in updates:
        assert f": {total} tokens shared by" in update.note
        assert f"(budget {total})" in update.note
        assert sum(update.x[-1]) == total
    assert f"(budget {total})" in result.note
