"""What the page does when asked: run, stop, count, open, save. Widgets stay in layout.py, numbers
in the engine.

One model, one run at a time, in turns. Nothing here outlives a request except the model, how fast
the last run was, a stop signal per session while its run is on, and the shelf, whose keys only the
page that made a run knows.
"""

from __future__ import annotations

import html
import inspect
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, fields, replace
from typing import Any

import anyio
import gradio as gr

import dynamickv as dkv
from app import inputs
from app.examples import Example
from app.serving.model_host import ModelHost
from app.serving.sealed import sealed
from app.serving.shelf import Shelf
from app.serving.turns import Place, Turns
from app.serving.zero_gpu import estimate, is_zero_gpu, on_gpu
from app.snippets import snippets
from app.views import render_figures

from . import view_model as vm
from .live import Estimate, LiveRun, Speed
from .predictions import EXAMPLE_KEY, Predictions, require_mass

log = logging.getLogger(__name__)
RESTORE = {"restore": True}
"""Tells the answer cards to show their last finished comparison again."""
MAX_WAITING = 256
QUIET = {"state": "idle", "message": "", "detail": ""}
"""The status line when there is nothing to say."""
OWN_TEXT = "own"
"""What the example picker holds while the document is nobody's example."""
FORM_LENGTH = 14
"""Widgets that `Inputs.settings` lists."""
CAPACITY_PLACE = 3
"""Where the capacity stands among them."""
CAPACITIES = (8, 2048)
"""Bounds of the capacity slider."""
ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|http://\[[0-9a-fA-F:]+\](:\d{1,5})?")
SHOW_EVERY = 0.08
"""Seconds between two pictures of a run: faster than eyes follow, slower than the wire needs."""
CHARACTERS_PER_TOKEN = 4.2
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}


WAIT = 0.5
"""Seconds between two looks at the queue: how soon a closed tab gives up its place."""


@sealed(gr.Error, lambda sentence: page_error(sentence))
class Handlers:
    """All events of one page, bound to its models and examples."""

    def __init__(
        self,
        host: ModelHost,
        examples: dict[str, Example],
        shelf: Shelf | None = None,
        url: str = "http://127.0.0.1:7860",
        turns: Turns | None = None,
    ) -> None:
        self.host = host
        self.turns = turns or Turns()
        self.examples = examples
        self.shelf = shelf or Shelf()
        self.url = url
        self._stops: dict[str, threading.Event] = {}
        self._predictions = Predictions(self.shelf, examples)
        self._on_gpu = on_gpu(self._gpu_events, self._gpu_seconds)
        self._speed = next(
            (Speed.of(e.trace, "the recorded run") for e in examples.values() if e.trace), None
        )

    # ---- a run ----

    def begin(
        self, request: gr.Request, document: str, question: str, methods: list[str], *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Check the inputs before anything waits; outputs: status, Run, Stop."""
        try:
            self._request(document, question, methods, *settings)
        except ValueError as error:
            yield failed(error), gr.skip(), gr.skip()
            raise said_error(error) from None
        while len(self._stops) >= MAX_WAITING:  # begun, but left before their turn came
            self._stops.pop(next(iter(self._stops)))
        self._stops[session(request)] = threading.Event()
        yield (
            running("Waiting for the model"),
            gr.update(interactive=False),
            gr.update(interactive=True),
        )

    def run(
        self,
        request: gr.Request,
        document: str,
        question: str,
        methods: list[str],
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Run the comparison; outputs: status, cards, store, Run, Stop."""
        yield from self._guarded(
            request,
            lambda stop: self._run(stop, document, question, methods, *settings),
            lambda: self._expected(*self._request(document, question, methods, *settings)),
        )

    def _guarded(
        self,
        request: gr.Request,
        work: Callable[[threading.Event], Iterator[tuple[Any, ...]]],
        expect: Callable[[], float | None] = lambda: None,
    ) -> Iterator[tuple[Any, ...]]:
        """Do something when its turn comes; it can be stopped and can fail, and the page stays
        usable and says so. `expect` says how many seconds it will take, for those who wait.
        """
        key = session(request)
        stop = self._stops.setdefault(key, threading.Event())
        try:
            with self.turns.join(key, address(request), stop=stop, expected=expect()) as ticket:
                for place in ticket.places(WAIT):
                    yield waiting(place), gr.skip(), gr.skip(), *busy_buttons()
                yield from work(stop)
        except (ValueError, OSError, MemoryError) as error:
            yield failed(error), RESTORE, gr.skip(), *idle_buttons()
        except Exception as error:
            log.error("a comparison failed", exc_info=error)
            cause = type(error).__name__
            sentence = f"The run failed ({cause}): shorten the document or choose fewer methods."
            yield failed(sentence), RESTORE, gr.skip(), *idle_buttons()
        finally:
            if self._stops.get(key) is stop:
                del self._stops[key]

    def _run(
        self,
        stop: threading.Event,
        document: str,
        question: str,
        methods: list[str],
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        job, model_name = self._request(document, question, methods, *settings)
        if self.host.ready(model_name) is None:
            yield running(f"Loading {model_name}"), gr.skip(), gr.skip(), *busy_buttons()
        llm = self.host.get(model_name)
        live = LiveRun(
            [method.name for method in job.methods],
            question,
            job.max_new_tokens,
            llm.geometry.num_layers,
            self._estimate(job, model_name),
        )
        prefills: list[dkv.Prefill] = []
        start = time.perf_counter()
        events = self._stream(model_name, job, stop, prefills.append)
        yield from self._follow(events, live)
        if live.trace is None:
            stopped = {
                "state": "idle",
                "message": "Stopped while reading the prompt: nothing was answered.",
                "detail": "The page shows the run before it.",
            }
            yield stopped, RESTORE, gr.skip(), *idle_buttons()
            return
        if not cancelled(live.trace):
            self._speed = Speed.of(live.trace, "the last run here")
        told_run(live.trace)
        key = self.shelf.put(live.trace, "run", model_name, prefills[0] if prefills else None)
        yield ended(live.trace, start), *self._shown(live.trace, "run", key), *idle_buttons()

    def _follow(self, stream: Any, live: LiveRun) -> Iterator[tuple[Any, ...]]:
        """Show what happens while it happens."""
        start = shown_at = time.perf_counter()
        yield live.status(0), live.payload(), gr.skip(), *busy_buttons()
        with closing(stream) as events:
            for event in events:
                at_once = live.add(event)
                now = time.perf_counter()
                if at_once or now - shown_at >= SHOW_EVERY:
                    shown_at = now
                    yield live.status(now - start), live.payload(), gr.skip(), gr.skip(), gr.skip()

    # ---- going on from a run ----

    def answer(self, request: gr.Request, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Answer from the stored prefill with what the what-if panel asks for; outputs as `run`."""
        yield from self._guarded(request, lambda stop: self._answer(stop, event._data))

    def _answer(self, stop: threading.Event, asked: Any) -> Iterator[tuple[Any, ...]]:
        held, prefill = self._predictions.held(asked)
        method = inputs.build_what_if(asked)
        require_mass(method, prefill)
        runs = held.trace.runs
        same = next((run for run in runs if is_run_of(run, method)), None)
        if same is not None:
            raise ValueError(f"{method.name} with these settings is answered already.")
        earlier = [
            run
            for run, (look, _) in zip(runs, vm.run_names(runs), strict=True)
            if look not in ("What if", "Manual")
        ]
        trace = replace(held.trace, runs=earlier)
        style = "What if" if any(run.method == method.name for run in earlier) else method.name
        cut = [len(run.token_ids) for run in runs if run.finish_reason == "length"]
        whole = [inputs.DEFAULT_NEW_TOKENS, *(len(run.token_ids) for run in runs)]
        longest = max(cut or whole)
        live = LiveRun(
            [method.name],
            trace.prompt.question,
            longest,
            trace.model.num_layers,
            before=vm.cards(trace),
        )
        live.cards[0] |= vm.named(style, method.name)
        stream = dkv.compare_stream(
            self.host.get(held.model),
            prefill=prefill,
            methods=[method],
            max_new_tokens=longest,
            scores=True,
            earlier=earlier,
            should_stop=stop.is_set,
        )
        start = time.perf_counter()
        yield from self._follow(stream, live)
        assert live.trace is not None  # there was no prefill that could be stopped
        # The record stays what it was, with a run more: its prefill was read when it was made.
        made = replace(live.trace, created=trace.created, prefill_seconds=trace.prefill_seconds)
        key = asked["key"]
        self.shelf.replace(key, made)
        yield ended(made, start), *self._shown(made, held.kind, key, added=True), *idle_buttons()

    def read(self, request: gr.Request, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Read a recorded run's prompt again, so that what-if can answer; outputs: status, the
        what-if panel, Run, Stop.
        """
        for status, _, panel, *buttons in self._guarded(
            request, lambda stop: self._read(stop, event._data)
        ):
            yield status, panel, *buttons

    def _read(self, stop: threading.Event, asked: Any) -> Iterator[tuple[Any, ...]]:
        held = self._predictions.known(asked)
        if is_zero_gpu():
            raise ValueError(
                "This Space has a GPU only while a run is on and keeps no prompt for what-if: "
                "press Run with other settings."
            )
        prompt, model = held.trace.prompt, self._model_of(held.trace)
        yield running(f"Loading {model}"), gr.skip(), gr.skip(), *busy_buttons()
        prefills: list[dkv.Prefill] = []
        stream = dkv.compare_stream(
            self.host.get(model),
            vm.document_of(prompt),
            prompt.question,
            methods=[dkv.FullKV()],
            max_new_tokens=1,
            question_aware=prompt.question_aware,
            on_prefill=prefills.append,
            should_stop=stop.is_set,
        )
        with closing(stream) as events:
            for event in events:
                if prefills:
                    break
                if isinstance(event, dkv.Progress):
                    yield (
                        running(
                            f"Reading the prompt (prefill): layer {event.completed} of "
                            f"{event.total}",
                            event.completed / max(event.total, 1),
                        ),
                        gr.skip(),
                        gr.skip(),
                        *busy_buttons(),
                    )
        if not prefills:
            yield (
                {"state": "idle", "message": "Stopped.", "detail": ""},
                gr.skip(),
                gr.skip(),
                *(idle_buttons()),
            )
            return
        if (
            prefills[0].prompt.text[: len(prompt.text)]
            != prompt.text[: len(prefills[0].prompt.text)]
        ):
            raise ValueError(
                f"{model} reads this prompt as another text than the record holds: press Run."
            )
        key = self.shelf.put(held.trace, held.kind, model, prefills[0])
        done = {
            "state": "idle",
            "message": f"The prompt is read ({vm.seconds(prefills[0].seconds)}).",
            "detail": "What-if now answers at once.",
        }
        yield done, gr.skip(), {"key": key}, *idle_buttons()

    def predict(self, asked: Any) -> dict[str, Any]:
        """What a method would keep of a stored prompt, without the model; for the browser, which
        gets {"error": one sentence} where that cannot be said.
        """
        try:
            return {"run": self._predictions.predict(asked)}
        except ValueError as error:
            return {"error": sentence_of(error)}

    def scores(self, asked: Any) -> dict[str, Any]:
        """One run's recorded scores, base64 of uint8 (layer, position); for the browser."""
        try:
            return {"bytes": self._predictions.scores(asked)}
        except ValueError as error:
            return {"error": sentence_of(error)}

    def _model_of(self, trace: dkv.Trace) -> str:
        """The offered model that made a record.

        Raises:
            ValueError: none of the offered.
        """
        name = trace.model.name
        for offered in self.host.names:
            llm = self.host.ready(offered)
            if name in (offered, llm.name if llm else None):
                return offered
        raise ValueError(f"This record is of {name!r}, which this page does not offer.")

    def _stream(
        self,
        model: str,
        job: inputs.Request,
        stop: threading.Event,
        on_prefill: Callable[[dkv.Prefill], None] | None = None,
        *,
        scores: bool = True,
    ) -> Iterator[dkv.Event]:
        """A comparison's events. On ZeroGPU it runs in another process: its prefill stays there."""
        if not is_zero_gpu():
            yield from self._events(model, job, scores, on_prefill, stop.is_set)
            return
        with closing(self._on_gpu(model, job, scores)) as events:
            for event in events:
                if stop.is_set():
                    return
                yield event

    def _events(
        self,
        model: str,
        job: inputs.Request,
        scores: bool,
        on_prefill: Callable[[dkv.Prefill], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[dkv.Event]:
        return dkv.compare_stream(
            self.host.get(model),
            job.document,
            job.question,
            methods=job.methods,
            max_new_tokens=job.max_new_tokens,
            truncate=job.truncate,
            scores=scores,
            on_prefill=on_prefill,
            should_stop=should_stop,
            question_aware=job.question_aware,
        )

    def _gpu_events(
        self, model: str, job: inputs.Request, scores: bool
    ) -> Generator[dkv.Event, None, None]:
        yield from self._events(model, job, scores)

    def _gpu_seconds(self, model: str, job: inputs.Request, scores: bool = True) -> int:
        """GPU seconds a comparison asks for; the arguments are those of `_gpu_events`."""
        size = self.host.measure(model, job.document, job.question)
        tokens = size.prompt if size else round(len(job.document) / CHARACTERS_PER_TOKEN)
        return estimate(tokens, len(job.methods), job.max_new_tokens)

    def _request(
        self, document: str, question: str, methods: list[str], *values: Any
    ) -> tuple[inputs.Request, str]:
        """From the widgets' values, in the order layout.py passes them."""
        *numbers, max_new_tokens, truncate, question_aware, model = values
        settings = dict(zip(inputs.SETTINGS, numbers, strict=True))
        job = inputs.build_request(
            document,
            question,
            methods,
            max_new_tokens,
            settings,
            truncate=truncate,
            question_aware=question_aware,
        )
        return job, self.host.check(model)

    def _estimate(self, job: inputs.Request, model: str) -> Estimate | None:
        """How long a job will take; None until the model is loaded and a speed is known."""
        size = self.host.measure(model, job.document, job.question)
        if size is None or self._speed is None:
            return None
        return self._speed.estimate(
            min(size.prompt, size.limit), len(job.methods), job.max_new_tokens
        )

    def _expected(self, job: inputs.Request, model: str) -> float | None:
        """The same in seconds, for those who wait."""
        estimate = self._estimate(job, model)
        return estimate.seconds if estimate else None

    def stop(self, request: gr.Request) -> Any:
        """Ask this session's run to end after the current layer or token; output: status."""
        stop = self._stops.get(session(request))
        if stop is None:
            return gr.skip()
        stop.set()
        return {
            "state": "running",
            "stopping": True,
            "message": "Stopping",
            "detail": "after the current layer or token",
            "done": 1,
        }

    # ---- small things ----

    async def model_state(self) -> AsyncIterator[dict[str, str]]:
        """The default model's state now, and again when it has loaded or failed."""
        yield asdict(self.host.state())
        if not self.host.settled:
            while not self.host.settled:
                await anyio.sleep(0.2)
            yield asdict(self.host.state())

    def count(self, document: str, question: str, model: str) -> dict[str, Any]:
        """Live token count; output: its readout, which carries the number as `tokens`."""
        if not document or not document.strip():
            return {"value": "", "note": "paste a text, upload a file or pick an example"}
        if len(document) > inputs.MAX_CHARACTERS:
            return {
                "value": f"{len(document):,} characters",
                "note": f"of at most {inputs.MAX_CHARACTERS:,}",
                "tone": "loud",
            }
        size = self.host.measure(
            model, document, question if question and question.strip() else "?"
        )
        if size is None:
            guess = round(len(document) / CHARACTERS_PER_TOKEN)
            return {
                "value": f"about {guess:,} tokens",
                "note": "exact once the model is ready",
                "tokens": guess,
            }
        if size.prompt > size.limit:
            note = (
                f"the model reads {size.limit:,}: shorten it, or cut its middle (advanced settings)"
            )
            return {
                "value": vm.count(size.prompt, "token"),
                "note": note,
                "tone": "loud",
                "tokens": size.prompt,
            }
        # The last token of an answer is never read.
        room = size.limit - size.prompt + 1
        rest = f", so answers end after {room}" if room < inputs.MAX_NEW_TOKENS else ""
        return {
            "value": vm.count(size.prompt, "token"),
            "note": f"in the prompt; the model reads {size.limit:,}{rest}",
            "tokens": size.prompt,
        }

    def capacity_line(
        self, capacity: float, counted: str | None, granularity: str, model: str
    ) -> dict[str, str]:
        """What the capacity means; `counted` is the token readout's JSON; output: the capacity's
        readout.
        """
        tokens = tokens_of(counted)
        geometry = self._geometry(model)
        if geometry is None:
            return {"value": "", "note": ""}
        heads = (
            geometry["num_query_heads"] if granularity == "query_head" else geometry["num_kv_heads"]
        )
        line = vm.capacity_line(geometry, int(capacity), tokens, heads)
        if tokens and capacity >= tokens:
            return {
                "value": "the prompt fits",
                "note": f"nothing to compress · {line}",
                "tone": "loud",
            }
        share, _, rest = line.partition(" · ")
        return {"value": share, "note": f"· {rest}" if rest else ""}

    def _geometry(self, model: str) -> dict[str, int] | None:
        """Sizes of the model, or of the recorded runs' model until it is loaded."""
        llm = self.host.ready(model)
        if llm is not None:
            return asdict(llm.geometry) | {"bytes_per_value": bytes_per_value(llm.dtype, 2)}
        trace = next((e.trace for e in self.examples.values() if e.trace), None)
        if trace is None:
            return None
        return asdict(trace.model) | {"bytes_per_value": bytes_per_value(trace.model.dtype, 4)}

    def pick(self, example_id: str) -> tuple[Any, ...]:
        """Show an example; outputs: cards, store, status, then the form (`form_values`)."""
        if example_id == OWN_TEXT:
            note = {"state": "idle", "message": "Paste or upload your text.", "detail": ""}
            return gr.skip(), gr.skip(), note, "", "", *[gr.skip()] * (FORM_LENGTH - 2)
        example = self.examples.get(example_id) if isinstance(example_id, str) else None
        if example is None:
            return (gr.skip(),) * (3 + FORM_LENGTH)
        if example.trace is None:
            note = {
                "state": "idle",
                "message": "No recorded run for this example: press Run.",
                "detail": "",
            }
            form = [example.document, example.question, gr.skip(), example.capacity]
            return gr.skip(), gr.skip(), note, *form, *[gr.skip()] * (FORM_LENGTH - len(form))
        return (
            *self.shown_example(example),
            QUIET,
            *self.form_values(example.trace, example.max_new_tokens),
        )

    def own_text(self, document: str, example_id: str | None) -> Any:
        """Let go of the example's title when the text is not its any more; output: example."""
        example = self.examples.get(example_id) if isinstance(example_id, str) else None
        if example is None:
            return gr.skip()
        return gr.skip() if is_document_of(example, document) else OWN_TEXT

    def link(self, request: gr.Request) -> tuple[Any, ...]:
        """Show the example and set the capacity that the page's address names; outputs: example,
        then as `pick`.
        """
        wanted = request.query_params.get("ex")
        example = self.examples.get(wanted)
        if example is None:
            return (gr.skip(),) * (4 + FORM_LENGTH)
        there = wanted == next(iter(self.examples))
        shown = [gr.skip()] * (4 + FORM_LENGTH) if there else [wanted, *self.pick(wanted)]
        capacity = linked_capacity(request.query_params.get("b"))
        if capacity is not None:
            shown[4 + CAPACITY_PLACE] = capacity
            recorded = capacity_of(example.trace) if example.trace is not None else None
            if recorded not in (None, capacity):
                shown[3] = {
                    "state": "idle",
                    "message": f"The link asks for capacity {capacity:,}; the run shown was "
                    f"recorded at {recorded:,}.",
                    "detail": f"Press Run for {capacity:,}.",
                }
        return tuple(shown)

    def snippets(
        self, request: gr.Request, question: str, methods: list[str], *values: Any
    ) -> list[str]:
        """Code for the form's values; outputs: Python, gradio_client, curl, MCP."""
        note = ""
        *_, aware, model = values
        question = (
            question if isinstance(question, str) and question.strip() else "What is it about?"
        )
        try:
            job, model = self._request(question, question, methods, *values)
        except ValueError as error:
            sentence = " ".join(sentence_of(error).split())
            note = f"# The form cannot be run as it is; these are the defaults. {sentence}\n"
            job = inputs.build_request(
                question,
                question,
                list(inputs.DEFAULT_METHODS),
                inputs.DEFAULT_NEW_TOKENS,
                {"capacity": inputs.DEFAULT_CAPACITY},
            )
            model = self.host.default
        capacity = next(
            (m.parameters["capacity"] for m in job.methods if "capacity" in m.parameters),
            inputs.DEFAULT_CAPACITY,
        )
        code = snippets(
            seen_at(request) or self.url,
            model,
            question,
            job.methods,
            capacity,
            job.max_new_tokens,
            bool(aware),
        )
        return [*(note + code[name] for name in ("python", "client", "curl")), code["mcp"]]

    def shown_example(self, example: Example) -> tuple[dict[str, Any], dict[str, Any]]:
        """Cards and store of an example's recorded run."""
        assert example.trace is not None
        return self._shown(
            example.trace, "recorded", f"{EXAMPLE_KEY}{example.id}", example=example.id
        )

    def form_values(self, trace: dkv.Trace, max_new_tokens: int | None = None) -> list[Any]:
        """What the form must say to run a record again, in the order of `Inputs.settings`."""
        # Of a record from a stranger only parameters that its method takes reach the widgets.
        taken = next(
            (
                run
                for run in reversed(trace.runs)
                if "capacity" in run.parameters and method_of(run)
            ),
            None,
        )
        parameters = taken.parameters if taken else {}
        untouched = inputs.form_defaults()
        numbers = [parameters.get(name, untouched.get(name)) for name in inputs.SETTINGS]
        if not isinstance(numbers[0], int) or not CAPACITIES[0] <= numbers[0] <= CAPACITIES[1]:
            numbers[0] = gr.skip()
        offered = inputs.offered_methods()
        names = {run.method for run in trace.runs} | {"FullKV"}
        return [
            vm.document_of(trace.prompt),
            trace.prompt.question,
            [name for name in offered if name in names],
            *numbers,
            max_new_tokens or gr.skip(),
            trace.prompt.truncated,
            trace.prompt.question_aware,
            trace.model.name if trace.model.name in self.host.names else gr.skip(),
        ]

    def _shown(
        self, trace: dkv.Trace, kind: str, key: str, *, example: str = "", added: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Cards and store of a record that lies under `key`."""
        label = vm.source_label(kind, trace.created) + (", one run added here" if added else "")
        held = self.shelf.get(key)
        ready = held is not None and held.prefill is not None
        return vm.cards_payload(trace, label, self._found(trace)), vm.trace_payload(
            trace, label, render_figures(trace), key=key, example=example, ready=ready
        )

    def _found(self, trace: dkv.Trace) -> list[list[bool]] | None:
        """Which facts each answer holds of those that the example expects whose text and question
        these are; None where they are of no example.
        """
        prompt = trace.prompt
        for example in self.examples.values():
            asked = example.expected and example.question.strip() == prompt.question.strip()
            if asked and is_document_of(example, vm.document_of(prompt)):
                return [example.facts_in(run.answer) for run in trace.runs]
        return None

    def upload(self, path: str | None) -> Any:
        """Read an uploaded text; output: document."""
        if path is None:
            return gr.skip()
        try:
            return inputs.read_text_upload(path)
        except (ValueError, OSError) as error:
            raise page_error(error) from None

    def open_run(self, path: str | None) -> tuple[Any, ...]:
        """Open a run file; outputs: tabs, cards, store, note, the form (`form_values`), example,
        status."""
        if path is None:
            return (gr.skip(),) * (6 + FORM_LENGTH)
        try:
            trace = inputs.read_run_upload(path)
        except (ValueError, OSError) as error:
            note = {"value": "Not opened.", "note": sentence_of(error), "tone": "loud"}
            return (*[gr.skip()] * 3, note, *[gr.skip()] * (2 + FORM_LENGTH))
        methods = ", ".join(run.method for run in trace.runs) or "no runs"
        note = {
            "value": "Opened.",
            "note": f"{methods} on {trace.prompt.length:,} tokens, shown on Explore.",
        }
        shown = self._shown(trace, "file", self.shelf.put(trace, "file"))
        explore = gr.update(selected="explore")
        return explore, *shown, note, *self.form_values(trace), OWN_TEXT, QUIET

    @staticmethod
    def lock_reference(methods: list[str]) -> Any:
        """FullKV stays chosen: it is what the others are compared with.

        Nothing is sent back where it is: the answer would undo what was ticked in the meantime.
        """
        if "FullKV" in methods:
            return gr.skip()
        return [name for name in dkv.METHODS if name == "FullKV" or name in methods]

    # ---- endpoints ----

    def compare(
        self,
        document: str,
        question: str,
        methods: list[str],
        capacity: int,
        max_new_tokens: int,
        model: str,
        request: gr.Request | None = None,
    ) -> dict[str, Any]:
        """Answer a question with several methods and return the run record."""
        try:
            job = inputs.build_request(
                document, question, methods, max_new_tokens, {"capacity": capacity}
            )
            model = self.host.check(model)
            expected = self._expected(job, model)
            with self.turns.join(session(request), address(request), expected=expected) as ticket:
                for _ in ticket.places(WAIT):
                    pass
                trace = last_trace(self._stream(model, job, ticket.stop, scores=False))
            told_run(trace)
            return trace.to_dict()
        except (ValueError, OSError, MemoryError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def tokenize(
        self, document: str, question: str, model: str, request: gr.Request | None = None
    ) -> dict[str, int]:
        """Length of a prompt in tokens."""
        try:
            if (
                not isinstance(document, str)
                or not document.strip()
                or len(document) > inputs.MAX_CHARACTERS
            ):
                raise ValueError(
                    f"The document must hold 1 to {inputs.MAX_CHARACTERS:,} characters."
                )
            if not isinstance(question, str) or len(question) > inputs.MAX_QUESTION_CHARACTERS:
                raise ValueError(
                    f"The question must be text of at most {inputs.MAX_QUESTION_CHARACTERS:,} "
                    "characters."
                )
            model = self.host.check(model)
            size = self.host.measure(model, document, question if question.strip() else "?")
            if size is None:
                # Loading it takes the place of the model that may be running.
                with self.turns.join(session(request), address(request)) as ticket:
                    for _ in ticket.places(WAIT):
                        pass
                    self.host.get(model)
                    size = self.host.measure(model, document, question if question.strip() else "?")
        except (ValueError, OSError, MemoryError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        assert size is not None  # the model is loaded
        return asdict(size)

    @staticmethod
    def list_methods() -> list[dict[str, Any]]:
        """The methods and their parameters with defaults; null where a value is required."""
        return [
            {
                "name": name,
                "description": (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " "),
                "parameters": {
                    f.name: f.default if isinstance(f.default, (int, float, str)) else None
                    for f in fields(method)
                },
            }
            for name, method in dkv.METHODS.items()
        ]


def bytes_per_value(dtype: str, otherwise: int) -> int:
    """Bytes of one number in the cache; weights may be packed ("float32 with 4bit weights")."""
    return BYTES_PER_VALUE.get(dtype.partition(" ")[0], otherwise)


def tokens_of(counted: str | None) -> int | None:
    """The number a token readout carries; browsers may send anything back."""
    try:
        tokens = json.loads(counted or "{}").get("tokens")
    except (ValueError, AttributeError):
        return None
    return tokens if isinstance(tokens, int) and 0 < tokens <= dkv.trace.MAX_POSITIONS else None


def is_run_of(run: dkv.Run, method: dkv.CompressionMethod) -> bool:
    """Whether a run was made by this very method; an older record may lack newer parameters."""
    return run.method == method.name and method_of(run) == method


def method_of(run: dkv.Run) -> dkv.CompressionMethod | None:
    """The method that a run's parameters describe, or None where they describe none."""
    try:
        return dkv.METHODS[run.method](**run.parameters)
    except (KeyError, TypeError, ValueError):
        return None


def capacity_of(trace: dkv.Trace) -> int | None:
    """The capacity at which a record's methods were compared."""
    found = (run.parameters.get("capacity") for run in trace.runs)
    return next((size for size in found if isinstance(size, int)), None)


def linked_capacity(text: str | None) -> int | None:
    """The capacity in an address, or None where it is none that the form offers."""
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= 4):
        return None
    return int(text) if CAPACITIES[0] <= int(text) <= CAPACITIES[1] else None


def is_document_of(example: Example, document: object) -> bool:
    """Whether a text is an example's; browsers read every line end as "\\n"."""
    texts = [example.document]
    if example.trace is not None:
        texts.append(vm.document_of(example.trace.prompt))
    return any(text.splitlines() == str(document).splitlines() for text in texts)


def last_trace(events: Iterator[dkv.Event]) -> dkv.Trace:
    """The record at the end of a comparison.

    Raises:
        ValueError: it was stopped before there was one.
    """
    for event in events:
        if isinstance(event, dkv.ComparisonFinished):
            return event.trace
    raise ValueError("Stopped while reading the prompt: nothing was answered.")


def told_run(trace: dkv.Trace) -> None:
    """Log a run: sizes and times, no text."""
    log.info(
        "run finished",
        extra={
            "methods": [run.method for run in trace.runs],
            "prompt_tokens": trace.prompt.length,
            "answer_tokens": [len(run.token_ids) for run in trace.runs],
            "prefill_seconds": round(trace.prefill_seconds, 3),
            "cancelled": cancelled(trace),
        },
    )


def waiting(place: Place) -> dict[str, Any]:
    """The status line of a run that waits for others."""
    status = running(f"Waiting for your turn: {vm.count(place.ahead, 'run')} before yours")
    if place.seconds:
        status["detail"] = f"about {vm.seconds(place.seconds)}, judging by the last runs"
    elif place.ahead and place.seconds is not None:
        status["detail"] = "longer than estimated, judging by the last runs"
    return status


def cancelled(trace: dkv.Trace) -> bool:
    """Whether a run of it was stopped."""
    return any(run.finish_reason == "cancelled" for run in trace.runs)


def running(message: str, done: float = 0) -> dict[str, Any]:
    """The status line while something goes on."""
    return {"state": "running", "message": message, "detail": "", "done": round(done, 3)}


def ended(trace: dkv.Trace, start: float) -> dict[str, Any]:
    """The status line of a finished run."""
    return {
        "state": "idle",
        "message": "Stopped: the answers are partial, what was kept is complete."
        if cancelled(trace)
        else "Done.",
        "detail": f"{time.perf_counter() - start:.1f} s in all",
    }


def busy_buttons() -> tuple[Any, Any]:
    """Run off, Stop on."""
    return gr.update(interactive=False), gr.update(interactive=True)


def idle_buttons() -> tuple[Any, Any]:
    """Run on, Stop off."""
    return gr.update(interactive=True), gr.update(interactive=False)


def sentence_of(error: object) -> str:
    """An error as a sentence: capital first, but not in a parameter's or file's name, full stop
    last."""
    text = str(error).strip() or type(error).__name__
    first = text[0] if re.search(r"[_.]\w", text.split(maxsplit=1)[0]) else text[0].upper()
    return first + text[1:] + ("" if text[-1] in ".!?" else ".")


def failed(error: object) -> dict[str, Any]:
    """The status line for an error."""
    return {"state": "error", "message": sentence_of(error), "detail": "Your inputs are kept."}


def page_error(error: object) -> gr.Error:
    """The same as Gradio's message; its toast reads HTML, so the text is escaped."""
    return gr.Error(
        html.escape(sentence_of(error)), print_exception=False, title="Not run", duration=8
    )


def said_error(error: object) -> gr.Error:
    """An error that the status line says already: it ends the event and shows no toast."""
    return gr.Error(html.escape(sentence_of(error)), print_exception=False, visible=False)


def seen_at(request: gr.Request | None) -> str:
    """The address under which a browser shows the page; empty where it does not say."""
    origin = str(request.headers.get("origin", "")) if request and request.request else ""
    return origin if ORIGIN.fullmatch(origin) else ""


def address(request: gr.Request | None) -> str:
    """The network address that a request comes from."""
    client = getattr(request, "client", None) if request is not None else None
    return str(getattr(client, "host", "") or "")


def session(request: gr.Request | None) -> str:
    """The browser tab's id; direct calls share one."""
    return (request.session_hash if request else None) or "direct"
