"""Why tokens were kept: the scores that a run recorded."""

from __future__ import annotations

from typing import Any

from app.explore.predictions import Predictions
from app.serving.events import handlers
from app.serving.status import sentence_of


@handlers
class EvidenceHandlers:
    """The evidence's one question to the server."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def scores(self, asked: Any) -> dict[str, Any]:
        """One run's recorded scores, base64 of uint8 (layer, position); for the browser, which gets
        {"error": one sentence} where there are none such.
        """
        try:
            return {"bytes": self._predictions.scores(asked)}
        except ValueError as error:
            return {"error": sentence_of(error)}
