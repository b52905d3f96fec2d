"""The page's events without a browser: all that `build_app` puts together, but no widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import gradio as gr

from app.examples import Example
from app.explore.handlers import ExploreHandlers
from app.form import FIELDS
from app.runs.endpoints import endpoints
from app.runs.handlers import RunsHandlers
from app.serving.comparisons import Comparisons
from app.serving.model_host import ModelHost
from app.serving.shelf import Shelf
from app.serving.shown import Shown
from app.serving.turns import Turns
from app.settings import SETTINGS, form_defaults
from tests.engine.tiny import DOCUMENT, QUESTION

DEFAULTS: dict[str, Any] = {
    "document": DOCUMENT,
    "question": QUESTION,
    "methods": ["SnapKV"],
    "capacity": 40,
    **{name: value for name, value in form_defaults().items() if name in SETTINGS},
    "max_new_tokens": 6,
    "decode_budget": 0,
    "decode_buffer": 16,
    "truncate": False,
    "question_aware": True,
    "model": "tiny",
    "expected": "",
}


def filled(**changes: Any) -> list[Any]:
    """The form's values as the page sends them; what is not given is the tiny model's."""
    assert set(changes) <= set(FIELDS)
    return [(DEFAULTS | changes)[name] for name in FIELDS]


def asking(session: str = "a") -> gr.Request:
    """A request of that browser tab."""
    return gr.Request(session_hash=session)


def last(results: Any) -> Any:
    """What an event sent at the end."""
    *_, result = results
    return result


@dataclass
class Page:
    """One page's machine and handlers."""

    host: ModelHost
    examples: dict[str, Example] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)
    shelf: Shelf = field(default_factory=Shelf)

    @cached_property
    def shown(self) -> Shown:
        return Shown(self.shelf, self.examples)

    @cached_property
    def comparisons(self) -> Comparisons:
        return Comparisons(self.host, self.examples.values())

    @cached_property
    def explore(self) -> ExploreHandlers:
        return ExploreHandlers.of(
            self.host, self.examples, self.comparisons, self.turns, self.shelf, self.shown
        )

    @cached_property
    def runs(self) -> RunsHandlers:
        return RunsHandlers(self.host, self.shelf, self.shown, "http://page:1")

    def endpoint(self, name: str) -> Callable[..., Any]:
        """The function behind a named endpoint."""
        return endpoints(self.host, self.comparisons, self.turns)[name][0]

    def press_run(self, session: str = "a", **changes: Any) -> Any:
        """Run the form; what the page gets at the end: status, cards, store, Run, Stop."""
        return last(self.explore.run.run(asking(session), *filled(**changes)))
