"""Needle grids: one small heatmap per method and capacity, depth over length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Figure, blank_figure

ROW = 166
TOP, BOTTOM = 56, 52


def render(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Methods in rows, capacities in columns; FullKV, which has none, stands in every column."""
    methods = list(dict.fromkeys(line["method"] for line in summary))
    sizes = sorted({line["capacity"] for line in summary if line["capacity"] is not None})
    columns: list[int | None] = [*sizes] or [None]
    height = ROW * len(methods) + TOP + BOTTOM
    figure = blank_figure(
        height, margin={"l": 46, "r": 8, "t": TOP, "b": BOTTOM}, showlegend=False, annotations=[]
    )
    by_place = {(line["method"], line["capacity"]): line for line in summary}
    number = 0
    for row, method in enumerate(methods):
        for column, size in enumerate(columns):
            line = by_place.get((method, size)) or by_place.get((method, None))
            if line is None:
                continue
            number += 1
            left, right = _span(column, len(columns), 0.05)
            bottom, top = _span(len(methods) - 1 - row, len(methods), 0.3)
            lengths, depths, table = _grid(line["cells"])
            end = "" if number == 1 else str(number)
            figure.add_heatmap(
                z=table,
                x=[f"{length:,}" for length in lengths],
                y=[f"{100 * depth:g} %" for depth in depths],
                xaxis=f"x{end}",
                yaxis=f"y{end}",
                zmin=0,
                zmax=1,
                colorscale="Cividis",
                showscale=False,
                xgap=1,
                ygap=1,
                hovertemplate=f"{method}{'' if size is None else f', capacity {size}'}"
                "<br>%{x} tokens, depth %{y}<br>exact %{z:.0%}<extra></extra>",
            )
            figure.update_layout(
                {
                    f"xaxis{end}": {
                        "domain": [left, right],
                        "anchor": f"y{end}",
                        "type": "category",
                        "fixedrange": True,
                        "showticklabels": row == len(methods) - 1,
                        "title": {"text": "Prompt tokens" if row == len(methods) - 1 else ""},
                    },
                    f"yaxis{end}": {
                        "domain": [bottom, top],
                        "anchor": f"x{end}",
                        "type": "category",
                        "autorange": "reversed",
                        "fixedrange": True,
                        "showticklabels": column == 0,
                    },
                }
            )
            # Once a row: beside one another, long names would overlap on a phone.
            name = f"<b>{method}</b><br>" if column == 0 else ""
            size_words = "" if line["capacity"] is None else f"{line['capacity']}: "
            figure.add_annotation(
                text=f"{name}{size_words}{100 * line['exact']:.0f} %",
                align="left",
                x=left,
                y=top,
                xref="paper",
                yref="paper",
                xanchor="left",
                yanchor="bottom",
                showarrow=False,
            )
    return Figure(
        plot=figure,
        height=height,
        note="Bright: the answer contains the hidden value. Dark: it does not. Down: deeper in "
        "the text. Right: longer prompts.",
    )


def _span(place: int, count: int, gap: float) -> tuple[float, float]:
    """Where the place-th of so many equal parts begins and ends; `gap` is each part's share of
    empty space."""
    return place / count, (place + 1 - gap) / count


def _grid(
    cells: Sequence[Mapping[str, Any]],
) -> tuple[list[int], list[float], list[list[float | None]]]:
    """(lengths, depths, exact score per depth and length); None where nothing was measured yet."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    held = {(cell["depth"], cell["length"]): cell["exact"] for cell in cells}
    return lengths, depths, [[held.get((d, n)) for n in lengths] for d in depths]
