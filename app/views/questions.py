"""One document, two questions: DynamicKV's tokens per layer for both, side by side. Takes two
records, so it is no tab of the explorer's.
"""

from __future__ import annotations

import plotly.graph_objects as go

from app.theme import method_style
from dynamickv.record.trace import Trace

from .base import Figure, layer_bars

LABELS = ("question A", "question B")
COLOURS = ("DynamicKV", "SnapKV")
"""Blue and orange, as the explorer's comparison of two runs has them."""


def render_questions(first: Trace, second: Trace) -> Figure:
    """Horizontal bars, layer 0 on top; every layer has one bar per question."""
    runs = [trace.run("DynamicKV") for trace in (first, second)]
    height = max(420, 17 * first.model.num_layers + 60)
    limit = 1.08 * max(kept for run in runs for kept in run.budgets)
    figure = layer_bars(first.model.num_layers, height, limit)
    for index, (run, label) in enumerate(zip(runs, LABELS, strict=True)):
        add_question(figure, run.budgets, index, label)
    return Figure(plot=figure, height=height, layer_axis="y")


def add_question(figure: go.Figure, budgets: list[int], index: int, label: str) -> None:
    """One bar per layer: solid for the first question, hatched for the second."""
    figure.add_bar(
        y=list(range(len(budgets))),
        x=budgets,
        orientation="h",
        name=label,
        meta=COLOURS[index],
        offset=-0.42 + 0.42 * index,
        width=0.38,
        marker={
            "color": method_style(COLOURS[index]).light,
            "line": {"width": 0},
            "pattern": {"shape": "/" if index else "", "fillmode": "overlay", "size": 5},
        },
        hovertemplate="layer %{y} · " + label + "<br>%{x:,} tokens kept<extra></extra>",
    )
