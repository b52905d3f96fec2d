"""LongBench: mean score of every method at every capacity, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.theme import method_style

from .base import Figure, blank_figure

HEIGHT = 380


def cells(
    summary: Sequence[Mapping[str, Any]], texts: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """What a click on every point opens: the example of which that method lost most, where its text
    is still here.
    """
    methods = list(dict.fromkeys(line["method"] for line in summary))
    found = []
    for trace, method in enumerate(methods):
        held = [line for line in summary if line["method"] == method]
        for place, line in enumerate(held):
            worst = line.get("worst")
            known = worst if texts and worst in texts else None
            opened = {"method": method, "capacity": line["capacity"], "example": known}
            words = _words(line, _ceiling(summary))
            found.append({"at": [trace, place], "words": words, "open": opened if known else None})
    return found


def _ceiling(summary: Sequence[Mapping[str, Any]]) -> float | None:
    return next((line["average"] for line in summary if line["capacity"] is None), None)


def _words(line: Mapping[str, Any], full: float | None) -> str:
    size = "" if line["capacity"] is None else f", capacity {line['capacity']:,}"
    beside = ""
    if full and line["capacity"] is not None:
        share = line["average"] / full
        beside = f", {100 * share:.0f} % of FullKV's {100 * full:.2f}"
    return f"{line['method']}{size}: {100 * line['average']:.2f}{beside}"


def render(summary: Sequence[Mapping[str, Any]], relative: bool = False) -> Figure:
    """Points with 95 % intervals over the capacity; FullKV stands at the right end, and its score
    is a line across, the ceiling. `relative` shows every score as a share of FullKV's.
    """
    sizes = sorted({line["capacity"] for line in summary if line["capacity"] is not None})
    places = [f"{size:,}" for size in sizes]
    methods = list(dict.fromkeys(line["method"] for line in summary))
    full = _ceiling(summary)
    scale = 100 / full if relative and full else 100
    title = "Mean score, per cent of FullKV's" if relative else "Mean score over tasks"
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
        yaxis={"title": {"text": title}, "fixedrange": True, "zeroline": False},
    )
    for method in methods:
        style = method_style(method)
        held = [line for line in summary if line["method"] == method]
        middle = [scale * line["average"] for line in held]
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
                    scale * line["interval"][1] - at for line, at in zip(held, middle, strict=True)
                ],
                "arrayminus": [
                    at - scale * line["interval"][0] for line, at in zip(held, middle, strict=True)
                ],
                "thickness": 1.5,
                "width": 3,
            },
            marker={"color": style.light, "symbol": style.symbol, "size": 9},
            text=[_words(line, full) for line in held],
            hovertemplate="%{text}<extra></extra>",
        )
    if full is not None:
        line = {"color": method_style("FullKV").light, "width": 1, "dash": "dot"}
        at = scale * full
        figure.add_shape(
            type="line", xref="paper", x0=0, x1=1, y0=at, y1=at, line=line, layer="below"
        )
    return Figure(plot=figure, height=HEIGHT)
