"""Where in the document the kept tokens lie: the share of each twentieth that survives, per
method.
"""

from __future__ import annotations

import html

import numpy as np

from app.record.words import run_names
from app.theme import method_style
from dynamickv.record.trace import Run, Trace

from .base import Figure, View, blank_figure

PARTS = 20


def render(trace: Trace) -> Figure:
    """Lines over the document from beginning to end; FullKV would be a line at 100 % and is left
    out.
    """
    figure = blank_figure(
        420,
        margin={"l": 52, "r": 14, "t": 8, "b": 42},
        legend={"orientation": "h", "y": 1.08, "x": 0},
        xaxis={
            "title": {"text": "Position in the document"},
            "ticksuffix": " %",
            "range": [0, 100],
            "zeroline": False,
            "fixedrange": True,
        },
        yaxis={
            "title": {"text": "Kept, over layers and heads"},
            "ticksuffix": " %",
            "rangemode": "tozero",
            "zeroline": False,
            "fixedrange": True,
        },
    )
    for run, (style_name, label) in zip(trace.runs, run_names(trace.runs), strict=True):
        if run.method == "FullKV":
            continue
        style = method_style(style_name)
        shares = kept_by_part(run, trace)
        middles = [100 * (part + 0.5) / len(shares) for part in range(len(shares))]
        figure.add_scatter(
            x=middles,
            y=[round(100 * share, 2) for share in shares],
            mode="lines+markers",
            name=html.escape(label),
            meta=style_name,
            line={"color": style.light, "dash": style.dash, "width": 2},
            marker={"color": style.light, "symbol": style.symbol, "size": 7},
            hovertemplate=html.escape(label) + "<br>%{y:.1f} % kept<extra></extra>",
        )
    return Figure(plot=figure, height=420, position_axis=True)


def kept_by_part(run: Run, trace: Trace) -> list[float]:
    """Kept share of each of `PARTS` equal stretches of the document (fewer when it has fewer
    tokens).
    """
    first, last = trace.prompt.document_span
    mask = run.retained.unpack(trace.model.num_layers, trace.prompt.length)[:, :, first:last]
    if mask.shape[2] == 0:
        return []
    per_position = mask.mean(axis=(0, 1))
    return [float(part.mean()) for part in np.array_split(per_position, min(PARTS, mask.shape[2]))]


VIEW = View(key="depth", title="Along the document", render=render)
