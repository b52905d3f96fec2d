"""Run and Stop: a comparison from the form's values, shown while it happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Protocol

import gradio as gr

import dynamickv as dkv
from app.explore.film import Film
from app.explore.live import LiveRun
from app.explore.predictions import Predictions
from app.form import Form
from app.inputs import Request
from app.serving.comparisons import Comparisons, log_run
from app.serving.events import (
    WAIT,
    address,
    busy_buttons,
    handlers,
    idle_buttons,
    said_error,
    session,
)
from app.serving.shelf import Shelf
from app.serving.shown import Shown
from app.serving.status import ended, failed, idle, running, told, waiting
from app.serving.stops import Stops
from app.serving.turns import Turns

RESTORE = {"restore": True}
"""Tells the answer cards, and what the views below show, to go back to the last whole run."""
SHOW_EVERY = 0.08
"""Seconds between two pictures of a run: faster than eyes follow, slower than the wire needs."""
Shows = Iterator[tuple[Any, ...]]
"""Status, cards, store, Run, Stop, again and again."""


class Models(Protocol):
    """What a run needs of the model host."""

    def check(self, name: str) -> str:
        """The name, if this page offers it."""

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model."""

    def ready(self, name: str) -> dkv.LoadedModel | None:
        """The model if it is loaded already."""


@handlers
class RunHandlers:
    """Events of Run and Stop; what else uses the model on Explore goes through `guarded`."""

    def __init__(
        self,
        models: Models,
        comparisons: Comparisons,
        turns: Turns,
        shelf: Shelf,
        shown: Shown,
        predictions: Predictions,
    ) -> None:
        self._models, self._comparisons, self._turns = models, comparisons, turns
        self._shelf, self._shown, self._predictions = shelf, shown, predictions
        self._stops = Stops()

    def begin(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Check the form before anything waits; outputs: status, Run, Stop."""
        try:
            self._job(values)
        except ValueError as error:
            yield failed(error), gr.skip(), gr.skip()
            raise said_error(error) from None
        self._stops.begin(session(request))
        yield running("Waiting for the model"), *busy_buttons()

    def run(self, request: gr.Request, *values: Any) -> Shows:
        """Run the comparison that the form asks for; outputs: status, cards, store, Run, Stop."""
        yield from self.guarded(
            request,
            lambda stop: self._run(stop, *self._job(values)),
            lambda: self._comparisons.seconds(*self._job(values)),
        )

    def busy(self, request: gr.Request) -> bool:
        """Whether this session's run is on or waits."""
        return self._stops.on(session(request))

    def stop(self, request: gr.Request) -> Any:
        """Ask this session's run to end after the current layer or token; output: status."""
        if not self._stops.ask(session(request)):
            return gr.skip()
        detail = "after the current layer or token"
        return running("Stopping", 1) | {"detail": detail, "stopping": True}

    def guarded(
        self,
        request: gr.Request,
        work: Callable[[threading.Event], Shows],
        expect: Callable[[], float | None] = lambda: None,
    ) -> Shows:
        """Do something when its turn comes; it can be stopped and can fail, and the page stays
        usable and says so. `expect` says how many seconds it will take, for those who wait.
        """
        who = session(request)
        stop = self._stops.begun(who)
        try:
            with self._turns.join(who, address(request), stop=stop, expected=expect()) as ticket:
                for place in ticket.places(WAIT):
                    yield waiting(place), gr.skip(), gr.skip(), *busy_buttons()
                yield from work(stop)
        except Exception as error:
            remedy = "shorten the document or choose fewer methods"
            said = told(error, "a comparison failed", "run", remedy)
            yield said, RESTORE, RESTORE, *idle_buttons()
        finally:
            self._stops.end(stop)

    def _job(self, values: tuple[Any, ...]) -> tuple[str, Request]:
        """The model and the comparison that the widgets' values ask for."""
        form = Form.of(values)
        job = form.request()
        return self._models.check(form.model), job

    def _run(self, stop: threading.Event, model: str, job: Request) -> Shows:
        if self._models.ready(model) is None:
            yield running(f"Loading {model}"), gr.skip(), gr.skip(), *busy_buttons()
        llm = self._models.get(model)
        live = LiveRun(
            [method.name for method in job.methods],
            job.question,
            job.max_new_tokens,
            llm.geometry.num_layers,
            self._comparisons.estimate(model, job),
            others=llm.geometry.uncompressed,
            film=Film(job.methods),
        )
        prefills: list[dkv.Prefill] = []
        start = time.perf_counter()
        yield from follow(self._comparisons.stream(model, job, stop, prefills.append), live)
        if live.trace is None:
            stopped = idle(
                "Stopped while reading the prompt: nothing was answered.",
                "The page shows the run before it.",
            )
            yield stopped, RESTORE, RESTORE, *idle_buttons()
            return
        self._comparisons.learn(live.trace)
        log_run(live.trace)
        key = self._shelf.put(live.trace, "run", model, prefills[0] if prefills else None)
        for prefill in prefills:
            self._predictions.prepare(prefill)
        shown = self._shown.record(live.trace, "run", key)
        yield ended(live.trace, start), *shown, *idle_buttons()


def follow(stream: Any, live: LiveRun) -> Shows:
    """Show what happens while it happens; `live` has the record in the end, if there is one."""
    start = shown_at = time.perf_counter()
    yield live.status(0), live.payload(), gr.skip(), *busy_buttons()
    with closing(stream) as events:
        for event in events:
            at_once = live.add(event)
            now = time.perf_counter()
            if at_once or now - shown_at >= SHOW_EVERY:
                shown_at = now
                film = live.film(now, at_once) or gr.skip()
                yield live.status(now - start), live.payload(), film, gr.skip(), gr.skip()
