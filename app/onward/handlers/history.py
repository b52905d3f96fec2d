"""Earlier runs of a tab: shown again from the shelf, by the keys that only this tab knows."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.examples import EXAMPLE_KEY, OWN_TEXT
from app.explore.predictions import Predictions
from app.form import FIELDS, form_of
from app.serving.events import handlers, placed
from app.serving.shown import Shown
from app.serving.status import failed, idle

RESTORED = ("status", "cards", "store", "example", *FIELDS)
"""What an earlier run changes, by the widgets' names."""


@handlers
class HistoryHandlers:
    """The event of an earlier run that is chosen."""

    def __init__(self, predictions: Predictions, shown: Shown, models: list[str]) -> None:
        self._predictions, self._shown, self._models = predictions, shown, models

    def restore(self, event: gr.EventData) -> list[Any]:
        """Show an earlier run again, with its text and settings; outputs: `RESTORED`."""
        return self.restored(event._data)

    def restored(self, asked: Any) -> list[Any]:
        """The same from what a browser sent."""
        try:
            held = self._predictions.known(asked)
        except ValueError:
            gone = ValueError(
                "The page no longer holds that run: it made room for newer ones, or the server "
                "was started anew. Press Run to make it again."
            )
            return placed(RESTORED, {"status": failed(gone)})
        key = asked["key"]
        example = key.removeprefix(EXAMPLE_KEY) if key.startswith(EXAMPLE_KEY) else ""
        cards, store = self._shown.record(held.trace, held.kind, key, example=example)
        changes = {"status": idle("An earlier run."), "cards": cards, "store": store}
        form = form_of(held.trace, self._models)
        return placed(RESTORED, {**changes, "example": example or OWN_TEXT, **form})
