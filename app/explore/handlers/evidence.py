"""Why tokens were kept, and what the answer read: recorded scores, and the attention of FullKV's
own decoding steps, which the model computes from a stored prefill.
"""

from __future__ import annotations

from typing import Any, Protocol

import dynamickv as dkv
from app.explore.predictions import Predictions
from app.serving.events import handlers
from app.serving.status import TOLD, sentence_of
from app.serving.turns import Turns

PATIENCE = 5.0
"""Seconds that reads wait for the model; a run takes longer, and the page asks again."""


class Models(Protocol):
    """What reads need of the model host."""

    def ready(self, name: str) -> dkv.LoadedModel | None:
        """The model if it is loaded already."""


@handlers
class EvidenceHandlers:
    """The evidence's questions to the server."""

    def __init__(self, predictions: Predictions, models: Models, turns: Turns) -> None:
        self._predictions, self._models, self._turns = predictions, models, turns

    def scores(self, asked: Any) -> dict[str, Any]:
        """One run's recorded scores, base64 of uint8 (layer, position); for the browser, which gets
        {"error": one sentence} where there are none such.
        """
        try:
            return {"bytes": self._predictions.scores(asked)}
        except ValueError as error:
            return {"error": sentence_of(error)}

    def reads(self, asked: Any) -> dict[str, Any]:
        """What FullKV's answer read of a stored prompt, and what of that every run kept; for the
        browser, which gets {"error": one sentence} where that cannot be said now.
        """
        try:
            return {"reads": self._reads(asked)}
        except TOLD as error:
            return {"error": sentence_of(error)}

    def _reads(self, asked: Any) -> dict[str, Any]:
        held, prefill = self._predictions.held(asked)
        trace = held.trace
        full = next((run for run in trace.runs if run.method == "FullKV"), None)
        if full is None or not full.token_ids:
            raise ValueError("This run has no answer of FullKV: run it with FullKV.")
        with self._turns.join(f"reads {asked['key']}") as ticket:
            if not ticket.wait(PATIENCE):
                raise ValueError("The model is busy with a run: try again when it is done.")
            llm = self._models.ready(held.model)
            if llm is None:
                raise ValueError(f"The model {held.model} is no longer loaded: press Run once.")
            length, layers = trace.prompt.length, trace.model.num_layers
            kept = [run.retained.unpack(layers, length) for run in trace.runs]
            question = None if prefill.question_aware else trace.prompt.question
            return dkv.reads(llm, prefill, full.token_ids, kept, question=question).to_dict()
