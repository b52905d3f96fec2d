"""On from a run whose prompt is held: how small each cache may be, and another question."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol

import gradio as gr

import dynamickv as dkv
from app.examples import Example
from app.explore.predictions import Predictions, require_mass
from app.inputs import DEFAULT_NEW_TOKENS, MAX_QUESTION_CHARACTERS
from app.onward.view_model import (
    Method,
    facts_of,
    how_words,
    marks_of,
    methods_of,
    painted,
    smallest_row,
)
from app.record.words import document_of
from app.serving.events import busy_buttons, handlers, idle_buttons
from app.serving.status import idle, reading, running
from app.wording import percent, seconds

Shows = Iterator[tuple[Any, ...]]
"""Status, cards, panel, Run, Stop, again and again."""
Guarded = Callable[[gr.Request, Callable[[threading.Event], Shows]], Shows]
"""`RunHandlers.guarded`."""


class Models(Protocol):
    """What going on needs of the model host."""

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model."""


@handlers
class OnwardHandlers:
    """Events of the panel under the answers."""

    def __init__(
        self,
        models: Models,
        predictions: Predictions,
        guarded: Guarded,
        examples: Mapping[str, Example],
    ) -> None:
        self._models, self._predictions = models, predictions
        self._guarded, self._examples = guarded, examples

    def smallest(self, request: gr.Request, event: gr.EventData) -> Shows:
        """Search every method's smallest capacity that still answers; outputs: status, the panel,
        Run, Stop.
        """
        yield from self._shown(request, lambda stop: self._smallest(stop, event._data))

    def ask(self, request: gr.Request, event: gr.EventData) -> Shows:
        """Ask another question on every run's cache; outputs: status, the panel, Run, Stop."""
        yield from self._shown(request, lambda stop: self._ask(stop, event._data))

    def _shown(self, request: gr.Request, work: Callable[[threading.Event], Shows]) -> Shows:
        for status, _, panel, *buttons in self._guarded(request, work):
            yield status, panel, *buttons

    def _smallest(self, stop: threading.Event, asked: Any) -> Shows:
        held, prefill = self._predictions.held(asked)
        trace, key = held.trace, asked["key"]
        methods = methods_of(trace)
        if not methods:
            raise ValueError("No method of this run compresses: run one beside FullKV.")
        full = next((run for run in trace.runs if run.method == "FullKV"), None)
        if full is None:
            raise ValueError("This run has no answer of FullKV: run it with FullKV.")
        for at in methods:
            require_mass(at.method, prefill)
        facts = facts_of(trace, self._examples.values())
        yield running(f"Loading {held.model}"), gr.skip(), gr.skip(), *busy_buttons()
        llm = self._models.get(held.model)
        rows: list[dict[str, Any]] = []
        start = time.perf_counter()
        done = 0
        for number, at in enumerate(methods):
            search = dkv.search_capacity(
                llm,
                prefill,
                at.method,
                expected=facts,
                question=None if prefill.question_aware else trace.prompt.question,
                full=full,
                max_new_tokens=max(len(full.token_ids), *(len(m.run.token_ids) for m in methods)),
                should_stop=stop.is_set,
            )
            each = max(1, len(dkv.capacities(at.method, prefill.length)).bit_length())
            found = None
            with closing(search):
                while True:
                    try:
                        probe = next(search)
                    except StopIteration as end:
                        found = end.value
                        break
                    done += 1
                    left = probe.left + each * (len(methods) - number - 1)
                    elapsed = time.perf_counter() - start
                    answers = "answers" if probe.answers else "does not answer"
                    status = running(
                        f"{at.label} at {probe.capacity:,} {answers}", done / (done + left)
                    )
                    status["detail"] = _left(elapsed, done, left)
                    yield status, gr.skip(), gr.skip(), *busy_buttons()
            if found is None:
                stopped = idle("Stopped: what was found is shown.")
                yield stopped, gr.skip(), gr.skip(), *idle_buttons()
                return
            rows.append(smallest_row(found, at, trace.prompt.length, at.run.kv_bytes_full))
            panel = {"key": key, "smallest": {"rows": rows, "how": how_words(found.by, facts)}}
            yield running(f"{at.label}: {found.capacity:,}"), gr.skip(), panel, *busy_buttons()
        took = f"{time.perf_counter() - start:.1f} s in all"
        yield idle("Done.", took), gr.skip(), gr.skip(), *idle_buttons()

    def _ask(self, stop: threading.Event, asked: Any) -> Shows:
        held, prefill = self._predictions.held(asked)
        trace, key = held.trace, asked["key"]
        question = checked(asked.get("question"))
        if not prefill.question_aware:
            raise ValueError(
                "This run was compressed before its question was asked, so any question is its "
                "first: type it into Question and press Run."
            )
        methods = methods_of(trace, compressing=False)
        for at in methods:
            if not at.run.token_ids:
                raise ValueError(f"{at.label} has no answer to go on from: press Run once.")
            require_mass(at.method, prefill)
        yield running(f"Loading {held.model}"), gr.skip(), gr.skip(), *busy_buttons()
        llm = self._models.get(held.model)
        rows: list[dict[str, Any]] = []
        panel = {"key": key, "asked": {"question": question, "rows": rows}}
        start = time.perf_counter()
        for number, at in enumerate(methods):
            if stop.is_set():
                yield idle("Stopped."), gr.skip(), gr.skip(), *idle_buttons()
                return
            status = running(f"Asking on: {at.label}", 0.5 * number / len(methods))
            status["detail"] = _left(time.perf_counter() - start, number, len(methods) - number)
            yield status, gr.skip(), gr.skip(), *busy_buttons()
            rows.append({**painted(at), "answer": asked_on(llm, prefill, at, question)})
            yield status, gr.skip(), panel, *busy_buttons()
        yield from self._compared(stop, held.trace, llm, methods, question, panel)

    def _compared(
        self,
        stop: threading.Event,
        trace: dkv.Trace,
        llm: dkv.LoadedModel,
        methods: list[Method],
        question: str,
        panel: dict[str, Any],
    ) -> Shows:
        """What the question would have kept, had it been the first: the document is read with it
        once.
        """
        compressing = [at for at in methods if at.method.capabilities.capacity]
        rows = panel["asked"]["rows"]
        stream = dkv.compare_stream(
            llm,
            document_of(trace.prompt),
            question,
            methods=[at.method for at in compressing] or [dkv.FullKV()],
            max_new_tokens=DEFAULT_NEW_TOKENS,
            should_stop=stop.is_set,
        )
        start, other = time.perf_counter(), None
        with closing(stream) as events:
            for event in events:
                if isinstance(event, dkv.Progress):
                    status = reading(event, 0.4)
                    status["done"] = round(0.5 + status["done"], 3)
                    elapsed = time.perf_counter() - start
                    status["detail"] = _left(
                        elapsed, event.completed, event.total - event.completed
                    )
                    yield status, gr.skip(), gr.skip(), *busy_buttons()
                elif isinstance(event, dkv.ComparisonFinished):
                    other = event.trace
        if other is None or stop.is_set():
            words = "Stopped: the answers are whole, what they lack was not compared."
            yield idle(words), gr.skip(), gr.skip(), *idle_buttons()
            return
        for at, run in zip(compressing, other.runs, strict=False):
            marks = marks_of(at.run, run, trace, other)
            row = rows[methods.index(at)]
            row["first"] = run.answer
            row["marks"] = marks
            if marks["held_share"] is not None:
                row["held"] = percent(marks["held_share"])
        yield idle("Done."), gr.skip(), panel, *idle_buttons()


def checked(question: Any) -> str:
    """A question that can be asked.

    Raises:
        ValueError: one sentence.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError("The other question is empty: type what else you want to know.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise ValueError(
            f"The question has {len(question):,} characters and this page reads "
            f"{MAX_QUESTION_CHARACTERS:,}: shorten it."
        )
    return question.strip()


def asked_on(llm: dkv.LoadedModel, prefill: dkv.Prefill, at: Method, question: str) -> str:
    """The answer to another question on the cache that a run's method leaves of its prompt."""
    talk = dkv.Conversation(llm, prefill, at.method)
    talk.said(at.run.token_ids)
    return talk.ask(question, DEFAULT_NEW_TOKENS)


def _left(elapsed: float, done: int, left: int) -> str:
    """How long something took, and how long it goes on at that speed."""
    if not done or not left:
        return f"{elapsed:.1f} s"
    return f"{elapsed:.1f} s · about {seconds(elapsed * left / done)} more"
