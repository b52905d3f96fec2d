"""What Runs & API does when asked: open a run file, and write the form's comparison as code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import gradio as gr

from app.examples import OWN_TEXT
from app.form import FIELDS, Form, form_of
from app.inputs import DEFAULT_METHODS, DEFAULT_NEW_TOKENS, build_request
from app.serving.events import handlers, placed, seen_at
from app.serving.shelf import Shelf
from app.serving.shown import Shown
from app.serving.status import idle, sentence_of
from app.settings import DEFAULT_CAPACITY
from app.snippets import snippets
from app.uploads import read_run_upload

OPENED = ("tabs", "cards", "store", "note", *FIELDS, "example", "status")
"""What opening a run file changes, by the widgets' names."""
WITHOUT_TEXT = FIELDS[1:]
"""What the snippets need of the form: they read the document from a file."""


class Models(Protocol):
    """What this tab needs of the model host."""

    default: str
    names: list[str]

    def check(self, name: str) -> str:
        """The name, if this page offers it."""


@handlers
class RunsHandlers:
    """Events of the tab."""

    def __init__(self, models: Models, shelf: Shelf, shown: Shown, url: str) -> None:
        self._models, self._shelf, self._shown, self._url = models, shelf, shown, url

    def open_run(self, path: str | None) -> list[Any]:
        """Open a run file; outputs: `OPENED`."""
        if path is None:
            return placed(OPENED, {})
        try:
            trace = read_run_upload(path)
        except (ValueError, OSError) as error:
            note = {"value": "Not opened.", "note": sentence_of(error), "tone": "loud"}
            return placed(OPENED, {"note": note})
        methods = ", ".join(run.method for run in trace.runs) or "no runs"
        lacks = f" An older file, without {', '.join(trace.lacks)}." if trace.lacks else ""
        note = {
            "value": "Opened.",
            "note": f"{methods} on {trace.prompt.length:,} tokens, shown on Explore.{lacks}",
        }
        cards, store = self._shown.record(trace, "file", self._shelf.put(trace, "file"))
        changes = {
            "tabs": gr.update(selected="explore"),
            "cards": cards,
            "store": store,
            "note": note,
            "example": OWN_TEXT,
            "status": idle(),
        }
        return placed(OPENED, changes | form_of(trace, self._models.names))

    def snippets(self, request: gr.Request, *values: Any) -> list[str]:
        """Code for the form's values, `WITHOUT_TEXT`; outputs: Python, gradio_client, curl, MCP."""
        note = ""
        form = Form.of(values, WITHOUT_TEXT)
        asked = isinstance(form.question, str) and form.question.strip()
        question = form.question if asked else "What is it about?"
        try:
            job = replace(form, document=question, question=question).request()
            model = self._models.check(form.model)
        except ValueError as error:
            sentence = " ".join(sentence_of(error, labels={}).split())
            note = f"# The form cannot be run as it is; these are the defaults. {sentence}\n"
            job = build_request(
                question,
                question,
                list(DEFAULT_METHODS),
                DEFAULT_NEW_TOKENS,
                {"capacity": DEFAULT_CAPACITY},
            )
            model = self._models.default
        capacity = next(
            (m.parameters["capacity"] for m in job.methods if "capacity" in m.parameters),
            DEFAULT_CAPACITY,
        )
        code = snippets(
            seen_at(request) or self._url,
            model,
            question,
            job.methods,
            capacity,
            job.max_new_tokens,
            bool(form.question_aware),
            truncate=job.truncate,
            decoding=job.decoding,
        )
        return [*(note + code[name] for name in ("python", "client", "curl")), code["mcp"]]
