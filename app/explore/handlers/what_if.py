"""What-if: other settings on a prompt that was read, predicted at once and answered on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

import gradio as gr

import dynamickv as dkv
from app.explore.live import LiveRun
from app.explore.predictions import Predictions, require_mass
from app.form import decoding_for, method_of
from app.inputs import DEFAULT_NEW_TOKENS, build_what_if
from app.record import cards
from app.record.words import document_of, run_names
from app.serving.events import busy_buttons, handlers, idle_buttons
from app.serving.shelf import Shelf
from app.serving.shown import Shown
from app.serving.status import ended, idle, reading, running, sentence_of
from app.serving.zero_gpu import is_zero_gpu
from app.wording import seconds

from .run import RESTORE, Shows, follow

Guarded = Callable[[gr.Request, Callable[[threading.Event], Shows]], Shows]
"""`RunHandlers.guarded`."""


class Models(Protocol):
    """What going on from a run needs of the model host."""

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model."""

    def maker(self, trace: dkv.Trace) -> str:
        """The offered model that made a record."""


@handlers
class WhatIfHandlers:
    """Events of the what-if panel, and its one question that needs no model."""

    def __init__(
        self,
        models: Models,
        predictions: Predictions,
        guarded: Guarded,
        shelf: Shelf,
        shown: Shown,
    ) -> None:
        self._models, self._predictions, self._guarded = models, predictions, guarded
        self._shelf, self._shown = shelf, shown

    def predict(self, asked: Any) -> dict[str, Any]:
        """What a method would keep of a stored prompt, without the model; for the browser, which
        gets {"error": one sentence} where that cannot be said.
        """
        try:
            return {"run": self._predictions.predict(asked)}
        except ValueError as error:
            return {"error": sentence_of(error)}

    def answer(self, request: gr.Request, event: gr.EventData) -> Shows:
        """Answer from the stored prefill with what the what-if panel asks for; outputs: status,
        cards, store, Run, Stop.
        """
        yield from self._guarded(request, lambda stop: self._answer(stop, event._data))

    def _answer(self, stop: threading.Event, asked: Any) -> Shows:
        held, prefill = self._predictions.held(asked)
        method = build_what_if(asked)
        require_mass(method, prefill)
        runs = held.trace.runs
        if any(is_run_of(run, method) for run in runs):
            raise ValueError(f"{method.name} with these settings is answered already.")
        earlier = [
            run
            for run, (look, _) in zip(runs, run_names(runs), strict=True)
            if look not in ("What if", "Manual")
        ]
        trace = replace(held.trace, runs=earlier)
        style = "What if" if any(run.method == method.name for run in earlier) else method.name
        cut = [len(run.token_ids) for run in runs if run.finish_reason == "length"]
        whole = [DEFAULT_NEW_TOKENS, *(len(run.token_ids) for run in runs)]
        longest = max(cut or whole)
        live = LiveRun(
            [method.name],
            trace.prompt.question,
            longest,
            trace.model.num_layers,
            others=trace.model.uncompressed,
            before=cards.cards(trace),
        )
        live.cards[0] |= cards.named(style, method.name)
        stream = dkv.compare_stream(
            self._models.get(held.model),
            prefill=prefill,
            methods=[method],
            max_new_tokens=longest,
            scores=True,
            earlier=earlier,
            expected=trace.expected.text if trace.expected else "",
            decoding=decoding_for(method, trace),
            should_stop=stop.is_set,
        )
        start = time.perf_counter()
        yield from follow(stream, live)
        assert live.trace is not None  # there was no prefill that could be stopped
        # The record stays what it was, with a run more: its prefill was read when it was made.
        made = replace(live.trace, created=trace.created, prefill_seconds=trace.prefill_seconds)
        key = asked["key"]
        self._shelf.replace(key, made)
        shown = self._shown.record(made, held.kind, key, added=True)
        yield ended(made, start), *shown, *idle_buttons()

    def read(self, request: gr.Request, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Read a recorded run's prompt again, so that what-if can answer; outputs: status, the
        what-if panel, Run, Stop.
        """
        for status, _, panel, *buttons in self._guarded(
            request, lambda stop: self._read(stop, event._data)
        ):
            yield status, gr.skip() if panel is RESTORE else panel, *buttons

    def _read(self, stop: threading.Event, asked: Any) -> Shows:
        held = self._predictions.known(asked)
        if is_zero_gpu():
            raise ValueError(
                "This Space has a GPU only while a run is on and keeps no prompt for what-if: "
                "press Run with other settings."
            )
        prompt, model = held.trace.prompt, self._models.maker(held.trace)
        yield running(f"Loading {model}"), gr.skip(), gr.skip(), *busy_buttons()
        prefills: list[dkv.Prefill] = []
        stream = dkv.compare_stream(
            self._models.get(model),
            document_of(prompt),
            prompt.question,
            methods=[dkv.FullKV()],
            max_new_tokens=1,
            question_aware=prompt.question_aware,
            on_prefill=prefills.append,
            should_stop=stop.is_set,
        )
        start = time.perf_counter()
        with closing(stream) as events:
            for event in events:
                if prefills:
                    break
                if isinstance(event, dkv.Progress):
                    yield (
                        reading(event) | {"detail": time_left(event, start)},
                        gr.skip(),
                        gr.skip(),
                        *busy_buttons(),
                    )
        if not prefills:
            yield idle("Stopped."), gr.skip(), gr.skip(), *idle_buttons()
            return
        if not same_text(prefills[0].prompt.text, prompt.text):
            raise ValueError(
                f"{model} reads this prompt as another text than the record holds: press Run."
            )
        key = self._shelf.put(held.trace, held.kind, model, prefills[0])
        self._predictions.prepare(prefills[0])
        done = idle(
            f"The prompt is read ({seconds(prefills[0].seconds)}).",
            "What-if now answers at once.",
        )
        yield done, gr.skip(), {"key": key}, *idle_buttons()


def time_left(event: dkv.Progress, start: float) -> str:
    """How long reading took so far, since `start` of `time.perf_counter`, and how long it goes on
    at that speed.
    """
    elapsed = time.perf_counter() - start
    if not 0 < event.completed < event.total:
        return f"{elapsed:.1f} s"
    left = elapsed * (event.total - event.completed) / event.completed
    return f"{elapsed:.1f} s · about {seconds(left)} more"


def is_run_of(run: dkv.Run, method: dkv.CompressionMethod) -> bool:
    """Whether a run was made by this very method; an older record may lack newer parameters."""
    return run.method == method.name and method_of(run) == method


def same_text(one: str, other: str) -> bool:
    """Whether two texts are the same as far as the shorter goes."""
    return one[: len(other)] == other[: len(one)]
