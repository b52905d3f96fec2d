"""The named endpoints, for gradio_client, curl, MCP and scripts; everything else on the page is
private. A new endpoint is one function here: its name, parameters, defaults and docstring are what
callers see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, Protocol, TypeVar

import gradio as gr

import dynamickv as dkv
from app.inputs import (
    DEFAULT_METHODS,
    DEFAULT_NEW_TOKENS,
    MAX_CHARACTERS,
    MAX_QUESTION_CHARACTERS,
    build_request,
)
from app.serving.comparisons import Comparisons, log_run
from app.serving.events import IN_TURNS, WAIT, address, handlers, session
from app.serving.model_host import PromptSize
from app.serving.status import TOLD
from app.serving.turns import Ticket, Turns
from app.settings import DEFAULT_CAPACITY

Function = TypeVar("Function", bound=Callable[..., Any])
LIGHT: dict[str, Any] = {"concurrency_limit": None}


class Host(Protocol):
    """What the endpoints need of the model host."""

    default: str

    def check(self, name: str) -> str:
        """The name, if this page offers it."""

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model."""

    def measure(self, name: str, document: str, question: str) -> PromptSize | None:
        """Length of a prompt, or None while the model is not loaded."""

    def describe(self) -> list[dict[str, Any]]:
        """The offered models."""


def add_endpoints(host: Host, comparisons: Comparisons, turns: Turns) -> None:
    """Register them with the page that is being built."""
    for function, options in endpoints(host, comparisons, turns).values():
        gr.api(function, api_name=function.__name__, **options)  # type: ignore[attr-defined]


def endpoints(
    host: Host, comparisons: Comparisons, turns: Turns
) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every endpoint by its name: the function, and how Gradio is to queue it."""
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
    default_model, default_methods = host.default, list(DEFAULT_METHODS)

    def endpoint(options: dict[str, Any]) -> Callable[[Function], Function]:
        def add(function: Function) -> Function:
            found[function.__name__] = handlers(function), options
            return function

        return add

    @endpoint(IN_TURNS)
    def compare(
        document: str,
        question: str,
        methods: list[str] = default_methods,
        capacity: int = DEFAULT_CAPACITY,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        model: str = default_model,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict[str, Any]:
        """Answer a question about a document with several methods over one prefill; returns the run
        record, schema 2.
        """
        try:
            settings = {"capacity": capacity}
            job = build_request(document, question, methods, max_new_tokens, settings)
            model = host.check(model)
            expected = comparisons.seconds(model, job)
            with turns.join(session(request), address(request), expected=expected) as ticket:
                wait(ticket)
                trace = last_trace(comparisons.stream(model, job, ticket.stop, scores=False))
        except TOLD as error:
            raise refusal(error) from None
        log_run(trace)
        return trace.to_dict()

    @endpoint(LIGHT)
    def tokenize(
        document: str,
        question: str = "",
        model: str = default_model,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict[str, Any]:
        """Count the tokens of a prompt, and say how many the model reads."""
        try:
            check_length(document, question)
            model = host.check(model)
            asked = question if question.strip() else "?"
            size = host.measure(model, document, asked)
            if size is None:
                # Loading it takes the place of the model that may be running.
                with turns.join(session(request), address(request)) as ticket:
                    wait(ticket)
                    host.get(model)
                    size = host.measure(model, document, asked)
        except TOLD as error:
            raise refusal(error) from None
        assert size is not None  # the model is loaded
        return asdict(size)

    @endpoint(LIGHT)
    def methods() -> list[dict[str, Any]]:
        """List the methods with their parameters and defaults; null where a value is required."""
        return [
            {
                "name": name,
                "description": (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " "),
                "parameters": {f.name: plain_default(f.default) for f in fields(method)},
            }
            for name, method in dkv.METHODS.items()
        ]

    @endpoint(LIGHT)
    def models() -> list[dict[str, Any]]:
        """List the models this page offers."""
        return host.describe()

    return found


def wait(ticket: Ticket) -> None:
    """Wait until it is this ticket's turn.

    Raises:
        ValueError: it was stopped meanwhile, or has left the queue.
    """
    for _ in ticket.places(WAIT):
        pass


def check_length(document: object, question: object) -> None:
    """Raise ValueError for what is no text, or too much of it."""
    if not isinstance(document, str) or not document.strip() or len(document) > MAX_CHARACTERS:
        raise ValueError(f"The document must hold 1 to {MAX_CHARACTERS:,} characters.")
    if not isinstance(question, str) or len(question) > MAX_QUESTION_CHARACTERS:
        raise ValueError(
            f"The question must be text of at most {MAX_QUESTION_CHARACTERS:,} characters."
        )


def plain_default(value: object) -> int | float | str | None:
    """A parameter's default, or None where a value is required."""
    return value if isinstance(value, (int, float, str)) else None


def last_trace(events: Any) -> dkv.Trace:
    """The record at the end of a comparison.

    Raises:
        ValueError: it was stopped before there was one.
    """
    for event in events:
        if isinstance(event, dkv.ComparisonFinished):
            return event.trace
    raise ValueError("Stopped while reading the prompt: nothing was answered.")


def refusal(error: BaseException) -> gr.Error:
    """An error as the endpoint's answer."""
    return gr.Error(str(error), print_exception=False)
