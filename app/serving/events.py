"""What every tab's events have in common: options, buttons, errors, and who asks."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from .sealed import sealed
from .status import sentence_of

WAIT = 0.5
"""Seconds between two looks at the queue: how soon a closed tab gives up its place."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
LIGHT: dict[str, Any] = {**PRIVATE, "concurrency_limit": None}
"""For events of the page that nobody waits for."""
IN_TURNS: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": None}
"""For events that use the model: they wait in turns.py, which knows who is next and says so."""
ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|http://\[[0-9a-fA-F:]+\](:\d{1,5})?")


def placed(names: Sequence[str], changes: Mapping[str, Any]) -> list[Any]:
    """Changes by widgets' names as Gradio takes them: one value for each name, and nothing for a
    widget that stays as it is.
    """
    return [changes.get(name, gr.skip()) for name in names]


def busy_buttons() -> tuple[Any, Any]:
    """Run off, Stop on."""
    return gr.update(interactive=False), gr.update(interactive=True)


def idle_buttons() -> tuple[Any, Any]:
    """Run on, Stop off."""
    return gr.update(interactive=True), gr.update(interactive=False)


def page_error(error: object) -> gr.Error:
    """An error as Gradio's message; its toast reads HTML, so the text is escaped."""
    return gr.Error(
        html.escape(sentence_of(error)), print_exception=False, title="Not run", duration=8
    )


def said_error(error: object) -> gr.Error:
    """An error that the status line says already: it ends the event and shows no toast."""
    return gr.Error(html.escape(sentence_of(error)), print_exception=False, visible=False)


handlers = sealed(gr.Error, page_error)
"""Decorates a class of events, or one function: a surprise becomes one sentence for the visitor."""


def session(request: gr.Request | None) -> str:
    """The browser tab's id; direct calls share one."""
    return (request.session_hash if request else None) or "direct"


def address(request: gr.Request | None) -> str:
    """The network address that a request comes from."""
    client = getattr(request, "client", None) if request is not None else None
    return str(getattr(client, "host", "") or "")


def seen_at(request: gr.Request | None) -> str:
    """The address under which a browser shows the page; empty where it does not say."""
    origin = str(request.headers.get("origin", "")) if request and request.request else ""
    return origin if ORIGIN.fullmatch(origin) else ""
