"""The panel under the answers: its events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.serving.events import IN_TURNS, LIGHT, PRIVATE

from .handlers import RESTORED, HistoryHandlers, OnwardHandlers


def wire_onward(
    handlers: OnwardHandlers, history: HistoryHandlers, widgets: Mapping[str, Any]
) -> None:
    """Which handler each event of the panel calls; `widgets` are Explore's by name."""
    panel = widgets["onward"]
    shown = [widgets[name] for name in ("status", "onward", "run", "stop")]
    panel.smallest(handlers.smallest, None, shown, **IN_TURNS, **PRIVATE)
    panel.ask(handlers.ask, None, shown, **IN_TURNS, **PRIVATE)
    panel.restore(history.restore, None, [widgets[name] for name in RESTORED], **LIGHT)
