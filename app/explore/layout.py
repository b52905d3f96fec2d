"""The Explore tab: which widgets there are, where they stand, and which handler each one calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

import dynamickv as dkv
from app.components import (
    AnswerCards,
    DocumentView,
    Evidence,
    FigureView,
    Film,
    Forgetting,
    LayerMap,
    ModelChip,
    Onward,
    Readout,
    StatusLine,
    TraceStore,
    WhatIf,
    WordView,
    dumps,
)
from app.examples import OWN_TEXT, Example
from app.form import FIELDS
from app.inputs import DEFAULT_BUFFER, DEFAULT_METHODS, DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS
from app.serving.events import IN_TURNS, LIGHT, PRIVATE
from app.serving.model_host import ModelHost
from app.serving.shown import Shown
from app.serving.speed import MASS_RATIO
from app.serving.status import idle
from app.settings import (
    ADVANCED,
    CAPACITIES,
    DEFAULT_CAPACITY,
    LABELS,
    Setting,
    form_defaults,
    offered_methods,
    what_if_form,
)
from app.views import VIEWS

from .handlers import ExploreHandlers, FormHandlers
from .handlers.form import LINKED, PICKED
from .view_model import counted_before, price

COUNTED = ("document", "question", "model")
"""What the number of tokens depends on."""
KEPT = ("example", "expected", *(name for name in FIELDS if name != "expected"))
"""What a tab keeps for as long as it lives (components/static/keep.js), in this order."""
KEEP = "(...values) => { window.DynamicKV.keep(values); }"
PICKING = "(example) => { window.DynamicKV.picking(); return example; }"
EXPECTING = "(example, expected) => window.DynamicKV.expecting(example, expected)"
OWN = "(...values) => window.DynamicKV.ownText(values)"
RESTORE = "(...values) => window.DynamicKV.restoreForm(values)"
UNFOLD = "() => { document.querySelector('#dkv-inputs').classList.toggle('dkv-form-open'); }"
"""On a narrow screen the form is folded: answers come first."""
Widgets = dict[str, Any]
"""The tab's widgets by name; the form's are named as in `FIELDS`."""


def build_explore(
    handlers: ExploreHandlers,
    host: ModelHost,
    examples: Mapping[str, Example],
    shown: Shown,
    model: gr.Dropdown,
    chip: ModelChip,
) -> Widgets:
    """The tab's content, its events included; `model` and `chip` stand in the page's head."""
    first = next(iter(examples.values()), None)
    opening_line = handlers.form.capacity_line(
        first.capacity if first else DEFAULT_CAPACITY,
        dumps(counted_before(first)),
        "kv_head",
        host.default,
    )
    widgets = {"model": model, "chip": chip, **build_form(examples, first, opening_line)}
    widgets |= build_results(handlers, shown, first)
    wire_run(handlers, widgets)
    wire_form(handlers.form, widgets)
    return widgets


def named(widgets: Widgets, names: Sequence[str]) -> list[Any]:
    """Widgets by their names, in that order."""
    return [widgets[name] for name in names]


def build_form(
    examples: Mapping[str, Example],
    first: Example | None,
    opening_line: dict[str, str],
) -> Widgets:
    """The column on the left: what to read, what to ask, how to compress, and the button."""
    made: Widgets = {}
    with gr.Column(scale=3, min_width=320, elem_id="dkv-inputs"):
        with gr.Column(elem_id="dkv-fields"):
            made |= build_fields(examples, first, opening_line)
        with gr.Column(elem_id="dkv-action"):
            with gr.Row(elem_id="dkv-run-row"):
                made["run"] = gr.Button(
                    "Run",
                    variant="primary",
                    scale=3,
                    interactive=first is not None,
                    elem_id="dkv-run",
                )
                made["stop"] = gr.Button(
                    "Stop", variant="secondary", scale=1, interactive=False, elem_id="dkv-stop"
                )
            made["status"] = StatusLine(idle(), elem_id="dkv-status")
    return made


def build_fields(
    examples: Mapping[str, Example], first: Example | None, opening_line: dict[str, str]
) -> Widgets:
    """What scrolls above the button."""
    made: Widgets = {}
    made["example"] = gr.Dropdown(
        [*((e.label, e.id) for e in examples.values()), ("Your own text", OWN_TEXT)],
        value=first.id if first else None,
        label="Example",
        elem_id="dkv-example",
        visible=bool(examples),
    )
    fold = gr.Button("Text, question and settings", elem_classes=["dkv-form-fold"])
    fold.click(None, None, None, js=UNFOLD, **PRIVATE)
    made["document"] = gr.Textbox(
        first.document if first else "",
        label="Document",
        lines=3,
        max_lines=3,
        placeholder="Paste a long text here.",
        elem_id="dkv-document",
    )
    with gr.Row(elem_id="dkv-below-document"):
        made["count"] = Readout(counted_before(first), min_width=120, scale=1, elem_id="dkv-count")
        made["upload"] = gr.UploadButton(
            "Upload .txt or .md",
            file_types=[".txt", ".md"],
            size="sm",
            scale=0,
            elem_id="dkv-upload",
        )
    made["question"] = gr.Textbox(
        first.question if first else "",
        label="Question",
        lines=2,
        max_lines=4,
        placeholder="What do you want to know about it?",
        elem_id="dkv-question",
    )
    sought = first.trace.expected if first and first.trace else None
    made["expected"] = gr.Textbox(
        sought.text if sought else "",
        label="Expected answer or passage",
        lines=1,
        max_lines=1,
        placeholder="optional: what a right answer holds",
        elem_id="dkv-expected",
    )
    made["methods"] = gr.CheckboxGroup(
        method_choices(), value=shown_methods(first), label="Methods", elem_id="dkv-methods"
    )
    made["price"] = Readout(price(MASS_RATIO, shown_methods(first)), elem_id="dkv-price")
    made["capacity"] = TypedSlider(
        *CAPACITIES,
        value=first.capacity if first else DEFAULT_CAPACITY,
        step=8,
        label="Capacity (tokens per layer)",
        elem_id="dkv-capacity",
    )
    made["capacity_line"] = Readout(opening_line, elem_id="dkv-capacity-line")
    made["question_aware"] = gr.Checkbox(
        True,
        label="Question-aware",
        info="Off: compressed before the question is asked.",
        elem_id="dkv-aware",
    )
    made |= build_advanced(first)
    return made


def build_advanced(first: Example | None) -> Widgets:
    """Settings that most people leave alone; defaults are the methods' own."""
    made: Widgets = {}
    default = form_defaults()
    with gr.Accordion("Advanced settings", open=False, elem_id="dkv-advanced"):
        for start in range(0, len(ADVANCED), 2):
            with gr.Row():
                for setting in ADVANCED[start : start + 2]:
                    made[setting.name] = setting_widget(setting, default[setting.name])
        made["max_new_tokens"] = gr.Slider(
            1,
            MAX_NEW_TOKENS,
            value=first.max_new_tokens if first else DEFAULT_NEW_TOKENS,
            step=1,
            label=f"{LABELS['max_new_tokens']}, in tokens",
        )
        with gr.Row():
            made["decode_budget"] = gr.Number(
                0,
                label=LABELS["decode_budget"],
                info="held while answering; 0: all",
                min_width=120,
            )
            made["decode_buffer"] = gr.Number(
                DEFAULT_BUFFER,
                label=LABELS["decode_buffer"],
                info="tokens between choices",
                min_width=120,
            )
        made["truncate"] = gr.Checkbox(
            False, label="Cut the middle out of a document that is too long"
        )
    return made


def method_choices() -> list[tuple[str, str]]:
    """Every offered method as the form shows it, and its name: what reads all of the attention
    takes long, and that is said before it is ticked.
    """
    slow = {name for name in offered_methods() if dkv.METHODS[name].capabilities.mass}
    return [(f"{name} (slow)" if name in slow else name, name) for name in offered_methods()]


def setting_widget(setting: Setting, value: Any) -> Any:
    """A number, or a choice among few."""
    shown: dict[str, Any] = {
        "label": setting.label,
        "info": setting.info or None,
        "min_width": 120,
    }
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=value, **shown)
    # Gradio's own bounds would round 1.5, and say what is too small without its name.
    return gr.Number(value, **shown)


class TypedSlider(gr.Slider):
    """A slider whose number comes as it was typed: whoever reads it says what is wrong with it by
    the form's name, where Gradio would say it without one and fill the log."""

    def preprocess(self, payload: float) -> float:
        """Nothing is refused here."""
        return payload

    def get_block_name(self) -> str:
        """Gradio finds the browser side of subclasses by this name."""
        return "slider"


def shown_methods(first: Example | None) -> list[str]:
    """Ticked at the start: the methods of the run on screen."""
    if first is None or first.trace is None:
        return list(DEFAULT_METHODS)
    return [name for name in offered_methods() if name in {r.method for r in first.trace.runs}]


def build_results(handlers: ExploreHandlers, shown: Shown, first: Example | None) -> Widgets:
    """The column on the right: answers, and below them what each cache kept. A recorded run is
    there from the start.
    """
    recorded = first is not None and first.trace is not None
    cards, store = shown.example(first) if first and recorded else (None, None)

    # Gradio offers the functions themselves to the browser, by these names.
    def predict(asked: Any) -> dict[str, Any]:
        return handlers.what_if.predict(asked)

    def scores(asked: Any) -> dict[str, Any]:
        return handlers.evidence.scores(asked)

    def reads(asked: Any) -> dict[str, Any]:
        return handlers.evidence.reads(asked)

    made: Widgets = {}
    with gr.Column(scale=9, min_width=320, elem_id="dkv-views"):
        made["cards"] = AnswerCards(cards, elem_id="dkv-answers")
        with gr.Row(elem_id="dkv-after-answers"):
            Film(elem_id="dkv-film")
            made["onward"] = Onward(elem_id="dkv-onward")
        Forgetting(elem_id="dkv-forgetting")
        with gr.Row(elem_id="dkv-stage"):
            with gr.Column(scale=6, min_width=320, elem_id="dkv-reading"):
                DocumentView(elem_id="dkv-document-view", elem_classes=["dkv-fill"])
                LayerMap(elem_id="dkv-map")
            with gr.Column(scale=5, min_width=320, elem_id="dkv-why"):
                WordView(elem_id="dkv-word", server_functions=[reads])
                made["what_if"] = WhatIf(
                    what_if_form(), server_functions=[predict], elem_id="dkv-what-if"
                )
                FigureView(
                    [{"key": v.key, "title": v.title} for v in VIEWS.values()],
                    elem_id="dkv-figures",
                )
        Evidence(elem_id="dkv-evidence", server_functions=[scores])
        made["store"] = TraceStore(store, elem_id="dkv-store")
    return made


def wire_run(handlers: ExploreHandlers, widgets: Widgets) -> None:
    """Run, Stop, and what goes on from a run."""
    buttons = ("run", "stop")
    ran = named(widgets, ("status", "cards", "store", *buttons))
    run_after(handlers, widgets, widgets["run"].click)
    what_if = widgets["what_if"]
    what_if.answer(handlers.what_if.answer, None, ran, **IN_TURNS, **PRIVATE)
    read = named(widgets, ("status", "what_if", *buttons))
    what_if.read(handlers.what_if.read, None, read, **IN_TURNS, **PRIVATE)
    widgets["stop"].click(handlers.run.stop, None, widgets["status"], queue=False, **PRIVATE)


def run_after(handlers: ExploreHandlers, widgets: Widgets, event: Any) -> None:
    """Run what the form asks for at an event such as `button.click`."""
    form, told = named(widgets, FIELDS), named(widgets, ("status", "run", "stop"))
    ran = named(widgets, ("status", "cards", "store", "run", "stop"))
    begun = event(handlers.run.begin, form, told, **LIGHT)
    done = begun.success(handlers.run.run, form, ran, **IN_TURNS, **PRIVATE)
    done.then(handlers.form.model_state, widgets["model"], widgets["chip"], **LIGHT)


def wire_form(handlers: FormHandlers, widgets: Widgets) -> None:
    """Example picker, upload, live counts."""
    latest: dict[str, Any] = {"trigger_mode": "always_last", **LIGHT}
    example, document = widgets["example"], widgets["document"]
    kept = named(widgets, KEPT)
    picked = example.input(handlers.pick, example, named(widgets, PICKED), js=PICKING, **LIGHT)
    picked.then(None, kept, kept, js=OWN, **PRIVATE)
    gr.on([widget.change for widget in kept], None, kept, None, js=KEEP, **PRIVATE)
    # However the text was changed: typed, pasted, dropped or uploaded.
    expected = widgets["expected"]
    owned = document.change(handlers.own_text, [document, example], example, **latest)
    # What the example expected goes with it, unless somebody has typed there in the meantime.
    owned.then(None, [example, expected], expected, js=EXPECTING, **PRIVATE)
    widgets["upload"].upload(handlers.upload, widgets["upload"], document, **LIGHT)
    model = widgets["model"]
    model.change(handlers.model_state, model, widgets["chip"], **latest)
    methods = widgets["methods"]
    methods.input(handlers.lock_reference, methods, methods, **LIGHT)
    methods.change(handlers.price, methods, widgets["price"], **latest)
    texts = [document, widgets["question"]]
    gr.on([text.change for text in texts], handlers.ready, texts, widgets["run"], **latest)
    gr.on(
        [widgets[name].change for name in COUNTED],
        handlers.count,
        named(widgets, COUNTED),
        widgets["count"],
        **latest,
    )
    gr.on(
        [widgets[name].change for name in ("capacity", "granularity", "count")],
        handlers.capacity_line,
        named(widgets, ("capacity", "count", "granularity", "model")),
        widgets["capacity_line"],
        **latest,
    )


def wire_opening(handlers: FormHandlers, widgets: Widgets, demo: gr.Blocks, opened: Any) -> None:
    """When somebody opens the page: the count again once the model is there (`opened`), and what
    its address asks for.
    """
    counted = named(widgets, COUNTED)
    opened.then(handlers.count, counted, widgets["count"], **LIGHT)
    linked = demo.load(handlers.link, None, named(widgets, LINKED), **LIGHT)
    kept = named(widgets, KEPT)
    linked.then(None, kept, kept, js=RESTORE, **PRIVATE)
