"""What Explore does when asked, one class per concern. Widgets stay in layout.py, numbers in the
engine.

One model, one run at a time, in turns. Nothing here outlives a request except the model, how fast
the last run was, a stop signal per session while its run is on, and the shelf, whose keys only the
page that made a run knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.examples import Example
from app.explore.predictions import Predictions
from app.serving.comparisons import Comparisons
from app.serving.model_host import ModelHost
from app.serving.shelf import Shelf
from app.serving.shown import Shown
from app.serving.turns import Turns

from .evidence import EvidenceHandlers
from .form import FormHandlers
from .run import RunHandlers
from .what_if import WhatIfHandlers


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploreHandlers:
    """Who answers the tab's events."""

    form: FormHandlers
    run: RunHandlers
    what_if: WhatIfHandlers
    evidence: EvidenceHandlers
    predictions: Predictions

    @classmethod
    def of(
        cls,
        host: ModelHost,
        examples: Mapping[str, Example],
        comparisons: Comparisons,
        turns: Turns,
        shelf: Shelf,
        shown: Shown,
    ) -> ExploreHandlers:
        """Each gets what it uses."""
        predictions = Predictions(shelf, examples)
        run = RunHandlers(host, comparisons, turns, shelf, shown, predictions)
        return cls(
            form=FormHandlers(host, examples, shown, run.busy, lambda: comparisons.mass_ratio),
            run=run,
            what_if=WhatIfHandlers(host, predictions, run.guarded, shelf, shown),
            evidence=EvidenceHandlers(predictions, host, turns),
            predictions=predictions,
        )


__all__ = [
    "EvidenceHandlers",
    "ExploreHandlers",
    "FormHandlers",
    "RunHandlers",
    "WhatIfHandlers",
]
