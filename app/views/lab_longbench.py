"""LongBench: mean score of every method at every capacity, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.theme import method_style

from .base import Figure, blank_figure

HEIGHT = 380


def render(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Points with 95 % intervals over the capacity; FullKV stands at the right end."""
    sizes = sorted({line["capacity"] for line in summary if line["capacity"] is not None})
    places = [f"{size:,}" for size in sizes]
    methods = list(dict.fromkeys(line["method"] for line in summary))
    figure = blank_figure(
        HEIGHT,
        margin={"l": 52, "r": 12, "t": 58, "b": 46},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        scattermode="group",
        xaxis={
            "title": {"text": "Capacity (budget, tokens per layer)"},
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [*places, "all"],
            "fixedrange": True,
        },
        yaxis={"title": {"text": "Mean score over tasks"}, "fixedrange": True, "zeroline": False},
    )
    for method in methods:
        style = method_style(method)
        held = [line for line in summary if line["method"] == method]
        middle = [100 * line["average"] for line in held]
        figure.add_scatter(
            x=["all" if line["capacity"] is None else f"{line['capacity']:,}" for line in held],
            y=middle,
            mode="markers",
            name=method,
            meta=method,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [
                    100 * line["interval"][1] - at for line, at in zip(held, middle, strict=True)
                ],
                "arrayminus": [
                    at - 100 * line["interval"][0] for line, at in zip(held, middle, strict=True)
                ],
                "thickness": 1.5,
                "width": 3,
            },
            marker={"color": style.light, "symbol": style.symbol, "size": 9},
            hovertemplate=f"{method} at %{{x}}<br>%{{y:.2f}}<extra></extra>",
        )
    return Figure(plot=figure, height=HEIGHT)
