"""The page: which widgets there are, where they stand, and which handler each one calls."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

import dynamickv as dkv

from .components import (
    AnswerCards,
    DocumentView,
    Evidence,
    FigureView,
    LayerMap,
    Learn,
    ModelChip,
    Readout,
    StatusLine,
    TraceStore,
    WhatIf,
    head,
    offline_page,
)
from .components.look import build_theme
from .examples import Example, load_examples
from .explore import view_model as vm
from .explore.handlers import CAPACITIES, OWN_TEXT, Handlers
from .inputs import (
    DEFAULT_CAPACITY,
    DEFAULT_METHODS,
    DEFAULT_NEW_TOKENS,
    MAX_NEW_TOKENS,
    WHAT_IF_SETTINGS,
    form_defaults,
    method_settings,
    offered_methods,
)
from .lab.handlers import LabHandlers
from .lab.layout import Shared, build_lab
from .learn import lesson_routes
from .runs.method_cards import method_cards
from .serving.guard import Guard
from .serving.health import health_routes
from .serving.model_host import ModelHost
from .serving.shelf import Shelf
from .serving.turns import Turns
from .views import VIEWS, plotly_source

TITLE = "DynamicKV Explorer"
MODEL_QUEUE = "model"
IN_TURNS: dict[str, Any] = {"concurrency_id": MODEL_QUEUE, "concurrency_limit": None}
"""For events that use the model: they wait in app/turns.py, which knows who is next and says so."""
MAX_EVENTS = 256
"""Events that Gradio's queue holds, the many small ones included."""
MAX_THREADS = 128
"""More than app/turns.py lets wait, so that small events always find a thread."""
MAX_SESSIONS = 32
"""Visitors whose last outputs Gradio keeps, some MB each. The page needs none of them: a visitor
beyond these is served alike."""
MAX_UPLOAD = "8mb"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(slots=True)
class Inputs:
    """The widgets a run reads."""

    example: gr.Dropdown
    document: gr.Textbox
    upload: gr.UploadButton
    count: Readout
    question: gr.Textbox
    methods: gr.CheckboxGroup
    capacity: gr.Slider
    capacity_line: Readout
    run: gr.Button
    stop: gr.Button
    status: StatusLine
    window_size: gr.Number
    kernel_size: gr.Number
    pooling: gr.Dropdown
    granularity: gr.Dropdown
    r_max: gr.Number
    update_interval: gr.Number
    max_new_tokens: gr.Slider
    truncate: gr.Checkbox
    question_aware: gr.Checkbox
    model: gr.Dropdown

    def settings(self) -> list[gr.components.Component]:
        """In the order `Handlers._request` takes them."""
        return [
            self.document,
            self.question,
            self.methods,
            self.capacity,
            self.window_size,
            self.kernel_size,
            self.pooling,
            self.granularity,
            self.r_max,
            self.update_interval,
            self.max_new_tokens,
            self.truncate,
            self.question_aware,
            self.model,
        ]


@dataclass(slots=True)
class Outputs:
    """The widgets a run writes."""

    cards: AnswerCards
    store: TraceStore
    what_if: WhatIf


def build_app(
    host: ModelHost | None = None,
    examples: dict[str, Example] | None = None,
    url: str = "http://127.0.0.1:7860",
    turns: Turns | None = None,
    shelf: Shelf | None = None,
) -> gr.Blocks:
    """The whole page; `launch_options` has what its launch needs. The default model starts loading
    at once.
    """
    host = host or ModelHost()
    examples = load_examples() if examples is None else examples
    handlers = Handlers(host, examples, shelf, url=url, turns=turns)
    first = next(iter(examples.values()), None)
    opening_line = handlers.capacity_line(
        first.capacity if first else DEFAULT_CAPACITY,
        vm.dumps(initial_count(first)),
        "kv_head",
        host.default,
    )
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as demo:
        chip = ModelChip(asdict(host.state()), elem_id="dkv-model")
        with gr.Tabs() as tabs:
            with gr.Tab("Explore", id="explore"), gr.Row(elem_id="dkv-workbench"):
                inputs = build_inputs(host, examples, first, opening_line)
                outputs = build_results(handlers, first)
            with gr.Tab("Lab", id="lab"):
                shared = Shared(inputs.document, inputs.question, inputs.model)
                build_lab(LabHandlers(host, examples, handlers.turns), shared)
            with gr.Tab("Learn", id="learn"):
                Learn(elem_id="dkv-learn")
            with gr.Tab("Runs & API", id="runs") as runs:
                build_runs(handlers, inputs, outputs, tabs, runs)
        gr.Markdown(f"DynamicKV Explorer {dkv.__version__}", elem_id="dkv-version")
        wire_run(handlers, inputs, outputs)
        wire_inputs(handlers, inputs, outputs)
        loaded = demo.load(handlers.model_state, None, chip, concurrency_limit=None, **PRIVATE)
        count_tokens = [inputs.document, inputs.question, inputs.model]
        loaded.then(handlers.count, count_tokens, inputs.count, concurrency_limit=None, **PRIVATE)
        demo.load(
            handlers.link,
            None,
            [inputs.example, outputs.cards, outputs.store, inputs.status, *inputs.settings()],
            concurrency_limit=None,
            **PRIVATE,
        )
        add_endpoints(handlers)
    host.start()
    return demo  # type: ignore[no-any-return]


def build_inputs(
    host: ModelHost,
    examples: dict[str, Example],
    first: Example | None,
    opening_line: dict[str, str],
) -> Inputs:
    """The column on the left: what to read, what to ask, how to compress, and the button."""
    with gr.Column(scale=3, min_width=320, elem_id="dkv-inputs"):
        example = gr.Dropdown(
            [*((e.label, e.id) for e in examples.values()), ("Your own text", OWN_TEXT)],
            value=first.id if first else None,
            label="Example",
            elem_id="dkv-example",
            visible=bool(examples),
        )
        document = gr.Textbox(
            first.document if first else "",
            label="Document",
            lines=4,
            max_lines=4,
            placeholder="Paste a long text here.",
            elem_id="dkv-document",
        )
        with gr.Row(elem_id="dkv-below-document"):
            count = Readout(initial_count(first), min_width=120, scale=1, elem_id="dkv-count")
            upload = gr.UploadButton(
                "Upload .txt or .md",
                file_types=[".txt", ".md"],
                size="sm",
                scale=0,
                elem_id="dkv-upload",
            )
        question = gr.Textbox(
            first.question if first else "",
            label="Question",
            lines=2,
            max_lines=4,
            placeholder="What do you want to know about it?",
            elem_id="dkv-question",
        )
        methods = gr.CheckboxGroup(
            offered_methods(),
            value=shown_methods(first),
            label="Methods",
            elem_id="dkv-methods",
        )
        capacity = gr.Slider(
            *CAPACITIES,
            value=first.capacity if first else DEFAULT_CAPACITY,
            step=8,
            label="Capacity (tokens per layer)",
            elem_id="dkv-capacity",
        )
        capacity_line = Readout(opening_line, elem_id="dkv-capacity-line")
        aware = gr.Checkbox(
            True,
            label="Question-aware",
            info="Off: compressed before the question is asked.",
            elem_id="dkv-aware",
        )
        advanced = build_advanced(host, first)
        with gr.Column(elem_id="dkv-action"):
            with gr.Row(elem_id="dkv-run-row"):
                run = gr.Button("Run", variant="primary", scale=3, elem_id="dkv-run")
                stop = gr.Button(
                    "Stop", variant="secondary", scale=1, interactive=False, elem_id="dkv-stop"
                )
            status = StatusLine(
                {"state": "idle", "message": "", "detail": ""}, elem_id="dkv-status"
            )
    return Inputs(
        example=example,
        document=document,
        upload=upload,
        count=count,
        question=question,
        methods=methods,
        capacity=capacity,
        capacity_line=capacity_line,
        run=run,
        stop=stop,
        status=status,
        question_aware=aware,
        **advanced,
    )


def build_advanced(host: ModelHost, first: Example | None) -> dict[str, Any]:
    """Settings that most people leave alone; defaults are the methods' own."""
    default = form_defaults()
    with gr.Accordion("Advanced settings", open=False, elem_id="dkv-advanced"):
        with gr.Row():
            window = gr.Number(
                default.get("window_size", 8),
                label="Window size",
                info="last tokens: they vote, and stay",
                precision=0,
                minimum=1,
                min_width=120,
            )
            kernel = gr.Number(
                default.get("kernel_size", 7),
                label="Kernel size",
                info="pooling width, odd",
                precision=0,
                minimum=1,
                min_width=120,
            )
        with gr.Row():
            pooling = gr.Dropdown(
                ["max", "avg"], value=default.get("pooling", "max"), label="Pooling", min_width=120
            )
            granularity = gr.Dropdown(
                [("KV head", "kv_head"), ("query head (larger cache)", "query_head")],
                value=default.get("granularity", "kv_head"),
                label="One choice per",
                min_width=120,
            )
        with gr.Row():
            r_max = gr.Number(
                default.get("r_max", 10),
                label="r_max",
                info="first cap, times mean",
                minimum=0,
                min_width=120,
            )
            interval = gr.Number(
                default.get("update_interval", 4),
                label="Update interval",
                info="DynamicKV, in layers",
                precision=0,
                minimum=1,
                min_width=120,
            )
        new_tokens = gr.Slider(
            1,
            MAX_NEW_TOKENS,
            value=first.max_new_tokens if first else DEFAULT_NEW_TOKENS,
            step=1,
            label="Longest answer, in tokens",
        )
        truncate = gr.Checkbox(False, label="Cut the middle out of a document that is too long")
        model = gr.Dropdown(
            host.choices(),
            value=host.default,
            label="Model",
            allow_custom_value=host.allow_any,
        )
    return {
        "window_size": window,
        "kernel_size": kernel,
        "pooling": pooling,
        "granularity": granularity,
        "r_max": r_max,
        "update_interval": interval,
        "max_new_tokens": new_tokens,
        "truncate": truncate,
        "model": model,
    }


def shown_methods(first: Example | None) -> list[str]:
    """Ticked at the start: the methods of the run on screen."""
    if first is None or first.trace is None:
        return list(DEFAULT_METHODS)
    return [name for name in offered_methods() if name in {r.method for r in first.trace.runs}]


def build_results(handlers: Handlers, first: Example | None) -> Outputs:
    """The column on the right: answers, and below them what each cache kept. A recorded run is
    there from the start.
    """
    recorded = first is not None and first.trace is not None
    cards, store = handlers.shown_example(first) if first and recorded else (None, None)

    # Gradio offers the functions themselves to the browser, by these names.
    def predict(asked: Any) -> dict[str, Any]:
        return handlers.predict(asked)

    def scores(asked: Any) -> dict[str, Any]:
        return handlers.scores(asked)

    with gr.Column(scale=9, min_width=320, elem_id="dkv-views"):
        answers = AnswerCards(cards, elem_id="dkv-answers")
        what_if = WhatIf(what_if_form(), server_functions=[predict], elem_id="dkv-what-if")
        with gr.Row(equal_height=True):
            with gr.Column(scale=6, min_width=320):
                DocumentView(elem_id="dkv-document-view", elem_classes=["dkv-fill"])
            with gr.Column(scale=5, min_width=320):
                FigureView(
                    [{"key": v.key, "title": v.title} for v in VIEWS.values()],
                    elem_id="dkv-figures",
                    elem_classes=["dkv-fill"],
                )
        Evidence(elem_id="dkv-evidence", server_functions=[scores])
        LayerMap(elem_id="dkv-map")
        keeper = TraceStore(store, elem_id="dkv-store")
    return Outputs(cards=answers, store=keeper, what_if=what_if)


def what_if_form() -> dict[str, Any]:
    """What the what-if panel offers: methods with the settings each takes, and their defaults."""
    return {
        "methods": {
            name: [s for s in WHAT_IF_SETTINGS if s in taken]
            for name, taken in method_settings().items()
            if name != "FullKV"
        },
        "defaults": form_defaults(),
    }


def build_runs(
    handlers: Handlers, inputs: Inputs, outputs: Outputs, tabs: gr.Tabs, tab: gr.Tab
) -> None:
    """Run files, which are shown on Explore once opened, and the same comparison from outside."""
    languages: list[tuple[str, str, Any]] = [
        ("python", "Python", "python"),
        ("client", "gradio_client", "python"),
        ("curl", "curl", "shell"),
        ("mcp", "MCP client settings (the page needs gradio[mcp])", "json"),
    ]
    with gr.Row(elem_classes=["dkv-split"]):
        with gr.Column(scale=2, min_width=300):
            gr.Markdown(
                "### Run files\nA run file holds the prompt, what every method kept, "
                "the answers and the measurements. It opens here without any model. "
                "It contains your document in clear, unless you save it without the text: then "
                "every letter is a dot, and all numbers stay."
            )
            with gr.Row():
                save = gr.Button("Save the run on screen", elem_id="dkv-save", min_width=160)
                bare = gr.Button("Save without the text", elem_id="dkv-save-bare", min_width=160)
            with gr.Row():
                page = gr.Button("Save as one HTML page", elem_id="dkv-save-page", min_width=160)
                load = gr.UploadButton(
                    "Open a run file",
                    file_types=[".json", ".gz"],
                    elem_id="dkv-open",
                    min_width=160,
                )
            note = Readout(None, elem_id="dkv-open-note")
            gr.Markdown(
                "The HTML page has the same views, about 5 MB, and needs neither network nor "
                "server. Links lead to built-in examples only: *Copy link* on Explore keeps what "
                "you look at. `?embed=1` shows the run alone, `?big=1` is for a lecture hall."
            )
            with gr.Accordion(
                "The methods, and where they depart from their authors' code",
                open=False,
                elem_id="dkv-method-accordion",
            ):
                gr.Markdown(method_cards(), elem_id="dkv-method-cards")
        with gr.Column(scale=3, min_width=300):
            gr.Markdown(
                "### The same comparison from code\nWith the values of the form. Save your "
                "document as `document.txt` beside it. The endpoints take the methods' own "
                "defaults for advanced settings, and let the scores see the question."
            )
            boxes = [
                gr.Code(
                    "",
                    language=language,
                    label=label,
                    interactive=False,
                    show_line_numbers=False,
                    wrap_lines=True,
                    elem_id=f"dkv-{key}",
                    elem_classes=["dkv-code"],
                )
                for key, label, language in languages
            ]
    for button, script in (
        (save, "saveRun(true)"),
        (bare, "saveRun(false)"),
        (page, "savePage()"),
    ):
        button.click(None, js=f"() => {{ window.DynamicKV.{script}; }}", api_visibility="private")
    load.upload(
        handlers.open_run,
        load,
        [
            tabs,
            outputs.cards,
            outputs.store,
            note,
            *inputs.settings(),
            inputs.example,
            inputs.status,
        ],
        concurrency_limit=None,
        **PRIVATE,
    )
    tab.select(
        handlers.snippets,
        [inputs.question, *inputs.settings()[2:]],
        boxes,
        concurrency_limit=None,
        **PRIVATE,
    )


def wire_run(handlers: Handlers, inputs: Inputs, outputs: Outputs) -> None:
    """Run and Stop."""
    buttons = [inputs.run, inputs.stop]
    begun = inputs.run.click(
        handlers.begin,
        inputs.settings(),
        [inputs.status, *buttons],
        concurrency_limit=None,
        **PRIVATE,
    )
    begun.success(
        handlers.run,
        inputs.settings(),
        [inputs.status, outputs.cards, outputs.store, *buttons],
        **IN_TURNS,
        **PRIVATE,
    )
    shared: dict[str, Any] = {**IN_TURNS, **PRIVATE}
    outputs.what_if.answer(
        handlers.answer, None, [inputs.status, outputs.cards, outputs.store, *buttons], **shared
    )
    outputs.what_if.read(handlers.read, None, [inputs.status, outputs.what_if, *buttons], **shared)
    inputs.stop.click(handlers.stop, None, inputs.status, queue=False, **PRIVATE)


def wire_inputs(handlers: Handlers, inputs: Inputs, outputs: Outputs) -> None:
    """Example picker, upload, live counts."""
    light: dict[str, Any] = {**PRIVATE, "concurrency_limit": None}
    inputs.example.input(
        handlers.pick,
        inputs.example,
        [outputs.cards, outputs.store, inputs.status, *inputs.settings()],
        **light,
    )
    # However the text was changed: typed, pasted, dropped or uploaded.
    inputs.document.change(
        handlers.own_text,
        [inputs.document, inputs.example],
        inputs.example,
        trigger_mode="always_last",
        **light,
    )
    inputs.upload.upload(handlers.upload, inputs.upload, inputs.document, **light)
    inputs.methods.input(handlers.lock_reference, inputs.methods, inputs.methods, **light)
    gr.on(
        [inputs.document.change, inputs.question.change, inputs.model.change],
        handlers.count,
        [inputs.document, inputs.question, inputs.model],
        inputs.count,
        trigger_mode="always_last",
        **light,
    )
    gr.on(
        [inputs.capacity.change, inputs.granularity.change, inputs.count.change],
        handlers.capacity_line,
        [inputs.capacity, inputs.count, inputs.granularity, inputs.model],
        inputs.capacity_line,
        trigger_mode="always_last",
        **light,
    )


def add_endpoints(handlers: Handlers) -> None:
    """Named endpoints for gradio_client, curl and scripts; everything else on the page is
    private.
    """
    default_model, default_methods = handlers.host.default, list(DEFAULT_METHODS)

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
        record, schema 1.
        """
        return handlers.compare(
            document, question, methods, capacity, max_new_tokens, model, request
        )

    def tokenize(
        document: str,
        question: str = "",
        model: str = default_model,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict[str, Any]:
        """Count the tokens of a prompt, and say how many the model reads."""
        return handlers.tokenize(document, question, model, request)

    def methods() -> list[dict[str, Any]]:
        """List the methods with their parameters and defaults; null where a value is required."""
        return handlers.list_methods()

    def models() -> list[dict[str, Any]]:
        """List the models this page offers."""
        return handlers.host.describe()

    register = gr.api  # type: ignore[attr-defined]
    register(compare, api_name="compare", **IN_TURNS)
    register(tokenize, api_name="tokenize", concurrency_limit=None)
    register(methods, api_name="methods", concurrency_limit=None)
    register(models, api_name="models", concurrency_limit=None)


def launch_options(host: ModelHost | None = None, turns: Turns | None = None) -> dict[str, Any]:
    """Arguments of `launch` that belong to the page: looks, limits, privacy, and what it serves
    besides. With the host and the turns of the page there is /health, and a client that goes away
    gives up its place.
    """
    watched = health_routes(host, turns) if host is not None and turns is not None else []
    return {
        "theme": build_theme(),
        "head": head(),
        "footer_links": ["api", "settings"],
        "run_history": False,
        "strict_cors": True,
        "enable_monitoring": False,
        "show_error": False,
        "max_file_size": MAX_UPLOAD,
        "max_threads": MAX_THREADS,
        "state_session_capacity": MAX_SESSIONS,
        # Needs gradio's extra: pip install "gradio[mcp]". Without it the page runs as ever.
        "mcp_server": importlib.util.find_spec("mcp") is not None,
        "app_kwargs": {
            "middleware": [
                Middleware(
                    Guard,
                    on_leave=turns.left if turns else None,
                    on_ask=turns.back if turns else None,
                )
            ],
            "routes": [
                *watched,
                # Under a prefix that Gradio's Node server hands on when it renders the page (SSR).
                Route("/gradio_api/explorer/plotly.js", plotly_script),
                Route("/gradio_api/explorer/offline.html", offline_skeleton),
                *lesson_routes(),
            ],
        },
    }


def plotly_script(_: HTTPRequest) -> Response:
    """The chart library, from the installed package."""
    return Response(
        plotly_source(),
        media_type="text/javascript",
        headers={"Cache-Control": "public, max-age=86400"},
    )


def offline_skeleton(_: HTTPRequest) -> Response:
    """The page of one run without the run, which the browser puts in; sent as text, so that it is
    never shown from here.
    """
    titles = tuple((view.key, view.title) for view in VIEWS.values())
    return Response(
        offline_page(plotly_source(), titles),
        media_type="text/plain; charset=utf-8",
        headers={"Cache-Control": "public, max-age=86400", "X-Content-Type-Options": "nosniff"},
    )


def initial_count(first: Example | None) -> dict[str, Any] | None:
    """Prompt length of the example on screen, known from its recorded run."""
    if first is None or first.trace is None:
        return None
    return {
        "value": f"{first.trace.prompt.length:,} tokens",
        "note": "in the prompt",
        "tokens": first.trace.prompt.length,
    }
