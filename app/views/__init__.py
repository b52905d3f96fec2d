"""The registry of views: one file and one line each; tabs and smoke tests follow from it."""

from __future__ import annotations

from typing import Any

from dynamickv.record.trace import Trace

from . import budgets, depth
from .base import Figure, Step, View
from .plotly_js import plotly_source

VIEWS: dict[str, View] = {
    view.key: view
    for view in (
        budgets.VIEW,
        depth.VIEW,
    )
}


def render_figures(trace: Trace) -> dict[str, Any]:
    """Every registered view of a record, ready for the browser."""
    return {key: view.render(trace).to_json() for key, view in VIEWS.items()}


__all__ = ["VIEWS", "Figure", "Step", "View", "plotly_source", "render_figures"]
