"""What a view is: a pure function from a run record to a figure the browser draws. No widget, no
state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from plotly.utils import PlotlyJSONEncoder

from dynamickv.record.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One frame of a figure's film: what every trace shows at that moment."""

    label: str
    note: str
    x: list[list[float]]
    """Values per figure trace, in the figure's order."""
    base: list[list[float]]
    """Where the bars start, per trace."""
    limit: float
    """End of the value axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A Plotly figure, its height in pixels, and optionally a film."""

    plot: go.Figure
    height: int
    note: str = ""
    """A sentence under the title."""
    steps: list[Step] = field(default_factory=list)
    layer_axis: str = ""
    """"x" or "y" when that axis counts layers: hovering it points at a layer everywhere."""
    position_axis: bool = False
    """Whether x runs over the document, in per cent."""
    wide_limit: float | None = None
    """A second end of the value axis, offered as a switch."""
    film_limit: float | None = None
    """The end of the value axis while the film plays, so that nothing but the bars moves."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the browser."""
        spec = json.loads(json.dumps(self.plot.to_plotly_json(), cls=PlotlyJSONEncoder))
        return {
            "data": spec["data"],
            "layout": spec["layout"],
            "height": self.height,
            "note": self.note,
            "layerAxis": self.layer_axis,
            "positionAxis": self.position_axis,
            "wideLimit": self.wide_limit,
            "filmLimit": self.film_limit,
            "steps": [
                {"label": s.label, "note": s.note, "x": s.x, "base": s.base, "limit": s.limit}
                for s in self.steps
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A named view: its tab's title and how to draw it."""

    key: str
    title: str
    render: Callable[[Trace], Figure]


def blank_figure(height: int, **layout: Any) -> go.Figure:
    """A figure in the page's manner: transparent, no template, zoom kept over updates."""
    figure = go.Figure()
    figure.update_layout(
        template=None,
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        uirevision="kept",
        hovermode="closest",
        **layout,
    )
    return figure


def layer_bars(num_layers: int, height: int, limit: float) -> go.Figure:
    """An empty chart for horizontal bars of kept tokens, layer 0 on top, up to `limit` tokens."""
    return blank_figure(
        height,
        barmode="overlay",
        showlegend=False,
        margin={"l": 40, "r": 14, "t": 8, "b": 42},
        yaxis={
            "title": {"text": "Layer", "standoff": 6},
            "range": [num_layers - 0.4, -0.6],
            "dtick": 5,
            "zeroline": False,
            "showgrid": False,
            "fixedrange": True,
        },
        xaxis={
            "title": {"text": "Prompt tokens kept per head, window included"},
            "range": [0, limit],
            "zeroline": False,
            "fixedrange": True,
        },
    )
