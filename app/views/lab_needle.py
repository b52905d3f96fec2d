"""Needle grids: one small heatmap per method and capacity, depth over length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Figure, blank_figure

ROW = 166
TOP, BOTTOM = 56, 78
CANNOT = 0.5
"""Below this score of FullKV a cell is grey: the model cannot do it, so no method can lose it."""
Place = tuple[int, float]
"""Prompt tokens and depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """One heatmap: whose it is, where it stands, and its cells."""

    method: str
    capacity: int | None
    row: int
    column: int
    exact: float
    cells: dict[Place, Mapping[str, Any]]
    ceiling: dict[Place, float]
    """FullKV's score of every cell that it was measured on."""

    def lost(self, place: Place) -> bool:
        """Whether FullKV itself hardly finds what is hidden there."""
        return self.method != "FullKV" and self.ceiling.get(place, 1.0) < CANNOT

    def of_full(self, place: Place) -> float | None:
        """The cell's score as a share of FullKV's; None where there is nothing to compare."""
        full = self.ceiling.get(place)
        return self.cells[place]["exact"] / full if full and place in self.cells else None


def maps(summary: Sequence[Mapping[str, Any]]) -> Iterator[Map]:
    """Methods in rows, capacities in columns; FullKV, which has none, stands in every column."""
    methods = list(dict.fromkeys(line["method"] for line in summary))
    sizes = sorted({line["capacity"] for line in summary if line["capacity"] is not None})
    by_place = {(line["method"], line["capacity"]): line for line in summary}
    full = by_place.get(("FullKV", None))
    ceiling = {} if full is None else {_place(cell): cell["exact"] for cell in full["cells"]}
    for row, method in enumerate(methods):
        for column, size in enumerate([*sizes] or [None]):
            line = by_place.get((method, size)) or by_place.get((method, None))
            if line is not None:
                yield Map(
                    method=method,
                    capacity=line["capacity"],
                    row=row,
                    column=column,
                    exact=line["exact"],
                    cells={_place(cell): cell for cell in line["cells"]},
                    ceiling=ceiling,
                )


def _place(cell: Mapping[str, Any]) -> Place:
    return cell["length"], cell["depth"]


def words(shown: Map, place: Place) -> str:
    """A cell in words: method, capacity, place, score, and what FullKV reaches there."""
    size = "" if shown.capacity is None else f", capacity {shown.capacity}"
    score = f"{100 * shown.cells[place]['exact']:.0f} % found"
    where = f"{place[0]:,} tokens, depth {100 * place[1]:g} %"
    ceiling = shown.ceiling.get(place)
    beside = (
        "" if ceiling is None or shown.method == "FullKV" else f"; FullKV {100 * ceiling:.0f} %"
    )
    cannot = ", so the model cannot do this cell" if shown.lost(place) else ""
    return f"{shown.method}{size}: {where}: {score}{beside}{cannot}"


def cells(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a click on every cell opens: where it is drawn, in words, and what to run."""
    found = []
    for number, shown in enumerate(maps(summary)):
        lengths, depths = _axes(shown)
        for place, cell in shown.cells.items():
            found.append(
                {
                    "at": [2 * number, depths.index(place[1]), lengths.index(place[0])],
                    "words": words(shown, place),
                    "open": {
                        "method": shown.method,
                        "capacity": shown.capacity,
                        "length": place[0],
                        "depth": place[1],
                        "sample": cell.get("sample", 0),
                    },
                }
            )
    return found


def render(summary: Sequence[Mapping[str, Any]], relative: bool = False) -> Figure:
    """The heatmaps; `relative` shows every score as a share of FullKV's."""
    shown = list(maps(summary))
    rows = 1 + max((one.row for one in shown), default=0)
    columns = 1 + max((one.column for one in shown), default=0)
    height = ROW * rows + TOP + BOTTOM
    figure = blank_figure(
        height, margin={"l": 46, "r": 8, "t": TOP, "b": BOTTOM}, showlegend=False, annotations=[]
    )
    for number, one in enumerate(shown, start=1):
        left, right = _span(one.column, columns, 0.05)
        bottom, top = _span(rows - 1 - one.row, rows, 0.3)
        end = "" if number == 1 else str(number)
        _add(figure, one, end, relative)
        last = one.row == rows - 1
        figure.update_layout(
            {
                f"xaxis{end}": {
                    "domain": [left, right],
                    "anchor": f"y{end}",
                    "type": "category",
                    "fixedrange": True,
                    "showticklabels": last,
                    # From the labels down, which are upright on a phone.
                    "title": {"text": "Prompt tokens" if last else "", "standoff": 8},
                },
                f"yaxis{end}": {
                    "domain": [bottom, top],
                    "anchor": f"x{end}",
                    "type": "category",
                    "autorange": "reversed",
                    "fixedrange": True,
                    "showticklabels": one.column == 0,
                },
            }
        )
        # Once a row: beside one another, long names would overlap on a phone.
        name = f"<b>{one.method}</b><br>" if one.column == 0 else ""
        size = "" if one.capacity is None else f"{one.capacity}: "
        figure.add_annotation(
            text=f"{name}{size}{_mean(one, relative)}",
            align="left",
            x=left,
            y=top,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
        )
    grey = "; grey: FullKV itself finds less than half" if any(map(_any_lost, shown)) else ""
    what = "per cent of FullKV's score" if relative else "share of hidden values found"
    return Figure(
        plot=figure,
        height=height,
        note=f"Bright is a high {what}{grey}; a cell opens its run.",
    )


def _any_lost(shown: Map) -> bool:
    return any(map(shown.lost, shown.cells))


def _mean(shown: Map, relative: bool) -> str:
    if not relative:
        return f"{100 * shown.exact:.0f} %"
    full = [shown.ceiling[place] for place in shown.cells if place in shown.ceiling]
    own = [cell["exact"] for place, cell in shown.cells.items() if place in shown.ceiling]
    return f"{100 * sum(own) / sum(full):.0f} % of FullKV" if sum(full) else "FullKV has 0 %"


def _axes(shown: Map) -> tuple[list[int], list[float]]:
    return sorted({n for n, _ in shown.cells}), sorted({d for _, d in shown.cells})


def _add(figure: Any, one: Map, end: str, relative: bool) -> None:
    """A heatmap's two traces: the scores, and in grey the cells that the model cannot do."""
    lengths, depths = _axes(one)

    def table(value: Any) -> list[list[Any]]:
        return [[value((n, d)) if (n, d) in one.cells else None for n in lengths] for d in depths]

    def score(place: Place) -> float | None:
        if one.lost(place):
            return None
        return one.of_full(place) if relative else one.cells[place]["exact"]

    shared = {
        "x": [f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}" for length in lengths],
        "y": [f"{100 * depth:g} %" for depth in depths],
        "xaxis": f"x{end}",
        "yaxis": f"y{end}",
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "text": table(lambda place: words(one, place)),
        "hovertemplate": "%{text}<extra></extra>",
    }
    figure.add_heatmap(z=table(score), zmin=0, zmax=1, colorscale="Cividis", **shared)
    grey = [[0, "#9aa0a6"], [1, "#9aa0a6"]]
    lost = table(lambda place: 1 if one.lost(place) else None)
    figure.add_heatmap(z=lost, zmin=0, zmax=1, colorscale=grey, **shared)


def _span(place: int, count: int, gap: float) -> tuple[float, float]:
    """Where the place-th of so many equal parts begins and ends; `gap` is each part's share of
    empty space."""
    return place / count, (place + 1 - gap) / count
