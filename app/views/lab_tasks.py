"""Task-awareness: budgets per layer of several tasks, overlaid and as the paper's heatmap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.theme import METHOD_STYLES, SPARE_STYLES

from .base import Figure, blank_figure

LOOKS = ("DynamicKV", "SnapKV", "PyramidKV", "H2O", "StreamingLLM", "Manual", "FullKV")
HEIGHT = 640


def cells(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a click on every field of the heatmap opens: a document with that kind of question."""
    kinds, method = list(summary["budgets"]), summary.get("method", "")
    return [
        {
            "at": [len(kinds), row, layer],
            "words": f"{method}, {kind}: layer {layer} keeps {budget:.0f} tokens per head",
            "open": {"kind": kind, "layer": layer},
        }
        for row, kind in enumerate(kinds)
        for layer, budget in enumerate(summary["budgets"][kind])
    ]


def render(summary: Mapping[str, Any]) -> Figure:
    """Lines above, a row a task below; both over the layers."""
    kinds = list(summary["budgets"])
    layers = list(range(len(next(iter(summary["budgets"].values())))))
    figure = blank_figure(
        HEIGHT,
        margin={"l": 104, "r": 12, "t": 58, "b": 46},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={
            "anchor": "y2",
            "title": {"text": "Layer"},
            "dtick": 5,
            "fixedrange": True,
            "zeroline": False,
        },
        yaxis={
            "anchor": "x",
            "domain": [0.44, 1],
            "title": {"text": "Tokens kept per head"},
            "rangemode": "tozero",
            "fixedrange": True,
            "zeroline": False,
        },
        yaxis2={
            "anchor": "x",
            "domain": [0, 0.36],
            "autorange": "reversed",
            "type": "category",
            "fixedrange": True,
        },
    )
    for place, kind in enumerate(kinds):
        look = LOOKS[place] if place < len(LOOKS) else ""
        style = METHOD_STYLES.get(look) or SPARE_STYLES[place % len(SPARE_STYLES)]
        figure.add_scatter(
            x=layers,
            y=summary["budgets"][kind],
            mode="lines+markers",
            name=kind,
            meta=look,
            line={"color": style.light, "dash": style.dash, "width": 2},
            marker={"color": style.light, "symbol": style.symbol, "size": 6},
            hovertemplate="layer %{x}<br>%{y:.0f} tokens<extra>%{fullData.name}</extra>",
        )
    figure.add_heatmap(
        z=[summary["budgets"][kind] for kind in kinds],
        x=layers,
        y=kinds,
        xaxis="x",
        yaxis="y2",
        colorscale="Cividis",
        showscale=False,
        ygap=2,
        hovertemplate="%{y}, layer %{x}<br>%{z:.0f} tokens<extra></extra>",
    )
    return Figure(plot=figure, height=HEIGHT)
