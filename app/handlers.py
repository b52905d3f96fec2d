"""What the page does when asked: run, stop, count, open, save. Widgets stay in layout.py, numbers
in the engine.

One model, one run at a time (the layout gives these events one queue). Nothing here outlives a
request except the models, how fast the last run was, and a stop signal per session while its run is
on.
"""

from __future__ import annotations

import html
import inspect
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import asdict, fields
from typing import Any

import anyio
import gradio as gr

import dynamickv as dkv

from . import inputs
from . import view_model as vm
from .examples import Example
from .live import LiveRun, Speed
from .model_host import ModelHost
from .views import render_figures

log = logging.getLogger(__name__)
RESTORE = {"restore": True}
"""Tells the answer cards to show their last finished comparison again."""
MAX_WAITING = 256
SHOW_EVERY = 0.08
"""Seconds between two pictures of a run: faster than eyes follow, slower than the wire needs."""
SETTINGS = (
    "capacity",
    "window_size",
    "kernel_size",
    "pooling",
    "granularity",
    "r_max",
    "update_interval",
)
QUESTION_AWARE_SWITCH = "question_aware" in inspect.signature(dkv.compare_stream).parameters
CHARACTERS_PER_TOKEN = 4.2
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}


class Handlers:
    """All events of one page, bound to its models and examples."""

    def __init__(self, host: ModelHost, examples: dict[str, Example]) -> None:
        self.host = host
        self.examples = examples
        self._stops: dict[str, threading.Event] = {}
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
            raise page_error(error) from None
        while len(self._stops) >= MAX_WAITING:  # begun, but left before their turn came
            self._stops.pop(next(iter(self._stops)))
        self._stops[session(request)] = threading.Event()
        waiting = {"state": "running", "message": "Waiting for the model", "detail": "", "done": 0}
        yield waiting, gr.update(interactive=False), gr.update(interactive=True)

    def run(
        self,
        request: gr.Request,
        document: str,
        question: str,
        methods: list[str],
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Run the comparison; outputs: status, cards, store, Run, Stop."""
        key = session(request)
        stop = self._stops.setdefault(key, threading.Event())
        try:
            yield from self._run(stop, document, question, methods, *settings)
        except (ValueError, OSError) as error:
            yield failed(error), RESTORE, gr.skip(), *idle_buttons()
            raise page_error(error) from None
        except Exception as error:  # whatever it is, the page stays usable and says so
            log.exception("a comparison failed")
            cause = type(error).__name__
            sentence = f"The run failed ({cause}): shorten the document or choose fewer methods."
            yield failed(sentence), RESTORE, gr.skip(), *idle_buttons()
            raise page_error(sentence) from None
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
            loading = {
                "state": "running",
                "message": f"Loading {model_name}",
                "detail": "",
                "done": 0,
            }
            yield loading, gr.skip(), gr.skip(), *busy_buttons()
        llm = self.host.get(model_name)
        live = LiveRun(
            [method.name for method in job.methods],
            question,
            job.max_new_tokens,
            llm.geometry.num_layers,
            self._estimate(model_name, job),
        )
        start = shown_at = time.perf_counter()
        yield live.status(0), live.payload(), gr.skip(), *busy_buttons()
        with closing(self._stream(llm, job, stop)) as events:
            for event in events:
                at_once = live.add(event)
                now = time.perf_counter()
                if at_once or now - shown_at >= SHOW_EVERY:
                    shown_at = now
                    yield live.status(now - start), live.payload(), gr.skip(), gr.skip(), gr.skip()
        if live.trace is None:
            stopped = {
                "state": "idle",
                "message": "Stopped while reading the prompt: nothing was answered.",
                "detail": "The page shows the run before it.",
            }
            yield stopped, RESTORE, gr.skip(), *idle_buttons()
            return
        cancelled = any(run.finish_reason == "cancelled" for run in live.trace.runs)
        if not cancelled:
            self._speed = Speed.of(live.trace, "the last run here")
        message = (
            "Stopped: the answers are partial, what was kept is complete." if cancelled else "Done."
        )
        done = {
            "state": "idle",
            "message": message,
            "detail": f"{time.perf_counter() - start:.1f} s in all",
        }
        yield done, *shown_payloads(live.trace, "run"), *idle_buttons()

    def _stream(self, llm: dkv.LoadedModel, job: inputs.Request, stop: threading.Event) -> Any:
        options: dict[str, Any] = (
            {"question_aware": job.question_aware} if QUESTION_AWARE_SWITCH else {}
        )
        return dkv.compare_stream(
            llm,
            job.document,
            job.question,
            methods=job.methods,
            max_new_tokens=job.max_new_tokens,
            truncate=job.truncate,
            should_stop=stop.is_set,
            **options,
        )

    def _request(
        self, document: str, question: str, methods: list[str], *values: Any
    ) -> tuple[inputs.Request, str]:
        """From the widgets' values, in the order layout.py passes them."""
        *numbers, max_new_tokens, truncate, question_aware, model = values
        settings = dict(zip(SETTINGS, numbers, strict=True))
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

    def _estimate(self, model: str, job: inputs.Request) -> str:
        if self._speed is None:
            return ""
        size = self.host.measure(model, job.document, job.question)
        if size is None:
            return ""
        return self._speed.estimate(
            min(size.prompt, size.limit), len(job.methods), job.max_new_tokens
        )

    def stop(self, request: gr.Request) -> Any:
        """Ask this session's run to end after the current layer or token; output: status."""
        stop = self._stops.get(session(request))
        if stop is None:
            return gr.skip()
        stop.set()
        return {
            "state": "running",
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
        return {
            "value": vm.count(size.prompt, "token"),
            "note": f"in the prompt; the model reads {size.limit:,}",
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
            return asdict(llm.geometry) | {"bytes_per_value": BYTES_PER_VALUE.get(llm.dtype, 2)}
        trace = next((e.trace for e in self.examples.values() if e.trace), None)
        if trace is None:
            return None
        return asdict(trace.model) | {"bytes_per_value": BYTES_PER_VALUE.get(trace.model.dtype, 4)}

    def pick(self, example_id: str) -> tuple[Any, ...]:
        """Show an example; outputs: document, question, capacity, max_new_tokens, cards, store,
        status.
        """
        example = self.examples.get(example_id)
        if example is None:
            return (gr.skip(),) * 7
        fields_ = (example.document, example.question, example.capacity, example.max_new_tokens)
        if example.trace is None:
            note = {
                "state": "idle",
                "message": "No recorded run for this example: press Run.",
                "detail": "",
            }
            return *fields_, gr.skip(), gr.skip(), note
        return (
            *fields_,
            *shown_payloads(example.trace, "recorded"),
            {"state": "idle", "message": "", "detail": ""},
        )

    def upload(self, path: str | None) -> Any:
        """Read an uploaded text; output: document."""
        if path is None:
            return gr.skip()
        try:
            return inputs.read_text_upload(path)
        except (ValueError, OSError) as error:
            raise page_error(error) from None

    def open_run(self, path: str | None) -> tuple[Any, ...]:
        """Open a run file; outputs: cards, store, note."""
        if path is None:
            return (gr.skip(),) * 3
        try:
            trace = inputs.read_run_upload(path)
        except (ValueError, OSError) as error:
            raise page_error(error) from None
        methods = ", ".join(run.method for run in trace.runs)
        return *shown_payloads(trace, "file"), {
            "value": "Opened.",
            "note": f"{methods} on {trace.prompt.length:,} tokens: see Explore.",
        }

    @staticmethod
    def lock_reference(methods: list[str]) -> list[str]:
        """FullKV stays chosen: it is what the others are compared with."""
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
    ) -> dict[str, Any]:
        """Answer a question with several methods and return the run record."""
        try:
            job = inputs.build_request(
                document, question, methods, max_new_tokens, {"capacity": capacity}
            )
            llm = self.host.get(model)
            return dkv.compare(
                llm,
                job.document,
                job.question,
                methods=job.methods,
                max_new_tokens=job.max_new_tokens,
            ).to_dict()
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def tokenize(self, document: str, question: str, model: str) -> dict[str, int]:
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
            self.host.get(model)
            size = self.host.measure(model, document, question if question.strip() else "?")
        except (ValueError, OSError) as error:
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


def shown_payloads(trace: dkv.Trace, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cards and store of a record."""
    label = vm.source_label(kind, trace.created)
    return vm.cards_payload(trace, label), vm.trace_payload(trace, label, render_figures(trace))


def tokens_of(counted: str | None) -> int | None:
    """The number a token readout carries; browsers may send anything back."""
    try:
        tokens = json.loads(counted or "{}").get("tokens")
    except (ValueError, AttributeError):
        return None
    return tokens if isinstance(tokens, int) and 0 < tokens <= dkv.trace.MAX_POSITIONS else None


def busy_buttons() -> tuple[Any, Any]:
    """Run off, Stop on."""
    return gr.update(interactive=False), gr.update(interactive=True)


def idle_buttons() -> tuple[Any, Any]:
    """Run on, Stop off."""
    return gr.update(interactive=True), gr.update(interactive=False)


def sentence_of(error: object) -> str:
    """An error as a sentence: capital first, full stop last."""
    text = str(error).strip() or type(error).__name__
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def failed(error: object) -> dict[str, Any]:
    """The status line for an error."""
    return {"state": "error", "message": sentence_of(error), "detail": "Your inputs are kept."}


def page_error(error: object) -> gr.Error:
    """The same as Gradio's message; its toast reads HTML, so the text is escaped."""
    return gr.Error(
        html.escape(sentence_of(error)), print_exception=False, title="Not run", duration=8
    )


def session(request: gr.Request | None) -> str:
    """The browser tab's id; direct calls share one."""
    return (request.session_hash if request else None) or "direct"
