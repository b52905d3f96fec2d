"""The Lab: four measurements with a form, a status line and a panel each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

import dynamickv as dkv
from app.components import LabPanel, LabStatus, Readout
from app.serving.events import IN_TURNS, LIGHT, PRIVATE
from app.serving.status import idle
from app.settings import DEFAULT_CAPACITY, offered_methods
from app.uploads import MAX_EXAMPLE_BYTES, MAX_EXAMPLES

from .handlers import FILE_NAME, OPENED, LabHandlers, OpeningHandlers
from .view_model import needle_form, recorded

longbench_tasks = dkv.evaluate.datasets.longbench_tasks
SIX = ("FullKV", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "DynamicKV")
COMMANDS = """The same from a terminal, for longer runs, other models, several GPUs or hosts:

```text
python -m dynamickv longbench --data DIR --capacity 128,512 --output results
accelerate launch -m dynamickv longbench --data DIR --model organisation/model --output results
```

`DIR` holds LongBench's files, one per task, or RULER's. A run that was stopped goes on from there.
"""


@dataclass(slots=True)
class Shared:
    """What the Lab takes from Explore."""

    document: gr.Textbox
    question: gr.Textbox
    model: gr.Dropdown
    widgets: Mapping[str, Any]
    """The page's `tabs` and Explore's, by name."""
    run: Callable[[Any], None]
    """Makes an event's success run what Explore's form asks for."""


@dataclass(slots=True)
class Part:
    """Widgets that every measurement has."""

    measure: gr.Button | gr.UploadButton
    stop: gr.Button
    status: LabStatus
    panel: LabPanel


def build_lab(handlers: LabHandlers, opening: OpeningHandlers, shared: Shared) -> None:
    """The tab's content; measurements and the page's runs take turns."""
    panels = build_parts(handlers, shared)
    outputs = [shared.widgets[name] for name in OPENED]
    for panel in panels:
        # The form first: what runs is what stands there.
        opened = panel.open(
            opening.open, [shared.document, shared.question], outputs, **IN_TURNS, **PRIVATE
        )
        shared.run(opened.success)


def build_parts(handlers: LabHandlers, shared: Shared) -> list[LabPanel]:
    """The four measurements; their panels."""
    models = [shared.model]
    panels = []
    with gr.Tabs(elem_id="dkv-lab-tabs"):
        with gr.Tab("Needle", id="lab-needle"), gr.Row(elem_classes=["dkv-split"]):
            with gr.Column(scale=3, min_width=300, elem_classes=["dkv-lab-form"]):
                gr.Markdown(
                    "Hide a number at every depth of texts of every length, and ask for it."
                )
                form = needle_form()
                methods = _methods(SIX)
                sizes = gr.Textbox(
                    form["capacities"],
                    label="Capacities",
                    elem_id="dkv-lab-capacities",
                    elem_classes=["dkv-field-capacity"],
                )
                lengths = gr.Textbox(
                    form["lengths"], label="Lengths, in tokens", elem_classes=["dkv-field-length"]
                )
                depths = gr.Slider(1, 11, value=form["depths"], step=1, label="Depths")
                samples = gr.Slider(1, 10, value=form["samples"], step=1, label="Texts per cell")
                needles = gr.Slider(1, 4, value=form["needles"], step=1, label="Needles per text")
                grid: list[Any] = [methods, sizes, lengths, depths, samples, needles]
                time = Readout(handlers.needle_time(*(field.value for field in grid)))
                changes = [widget.change for widget in grid]
                gr.on(
                    changes, handlers.needle_time, grid, time, trigger_mode="always_last", **LIGHT
                )
                buttons = _buttons("needle")
            part = _part("needle", *buttons)
            fields = [*models, *grid]
            panels.append(part.panel)
            _wire(handlers, handlers.needle, fields, part)
        with gr.Tab("Sweep", id="lab-sweep"), gr.Row(elem_classes=["dkv-split"]):
            with gr.Column(scale=3, min_width=300, elem_classes=["dkv-lab-form"]):
                gr.Markdown(
                    "Explore's document and question (recorded: the harbour report's), read once "
                    "and answered at 16 tokens per layer, its doubles and the whole prompt."
                )
                methods = _methods(SIX[1:])
                longest = gr.Slider(8, 128, value=48, step=8, label="Longest answer, in tokens")
                buttons = _buttons("sweep")
            part = _part("sweep", *buttons)
            fields = [shared.document, shared.question, *models, methods, longest]
            panels.append(part.panel)
            _wire(handlers, handlers.sweep, fields, part)
        with gr.Tab("Tasks", id="lab-tasks"), gr.Row(elem_classes=["dkv-split"]):
            with gr.Column(scale=3, min_width=300, elem_classes=["dkv-lab-form"]):
                gr.Markdown(
                    "Fifteen short documents of our own (prose, code, labelled examples), each "
                    "with the questions that suit it: which layers does each task fill?"
                )
                names = [name for name in offered_methods() if name != "FullKV"]
                method = gr.Dropdown(names, value="DynamicKV", label="Method")
                capacity = gr.Slider(
                    16, 1024, value=DEFAULT_CAPACITY, step=8, label="Capacity (tokens per layer)"
                )
                buttons = _buttons("tasks")
            part = _part("tasks", *buttons)
            panels.append(part.panel)
            _wire(handlers, handlers.tasks, [*models, method, capacity], part)
        with gr.Tab("LongBench", id="lab-longbench"):
            with gr.Row(elem_classes=["dkv-split"]):
                with gr.Column(scale=3, min_width=300, elem_classes=["dkv-lab-form"]):
                    gr.Markdown(
                        f"The first examples of a file in LongBench's or RULER's format (.jsonl, "
                        f"at most {MAX_EXAMPLE_BYTES // 2**20} MiB), deleted once it is read."
                    )
                    methods = _methods(SIX)
                    sizes = gr.Textbox(
                        "128", label="Capacities", elem_classes=["dkv-field-capacity"]
                    )
                    limit = gr.Slider(1, MAX_EXAMPLES, value=3, step=1, label="Examples")
                    task = gr.Dropdown(
                        [FILE_NAME, *longbench_tasks()], value=FILE_NAME, label="Task"
                    )
                    upload, stop, status = _upload_buttons("longbench")
                part = _part("longbench", upload, stop, status)
                widgets: list[Any] = [upload, *models, task, methods, sizes, limit]
                panels.append(part.panel)
                _wire(handlers, handlers.longbench, widgets, part, upload.upload)
            gr.Markdown(COMMANDS, elem_classes=["dkv-lab-commands"])
    return panels


def _methods(chosen: tuple[str, ...]) -> gr.CheckboxGroup:
    """The papers' methods ticked, the others offered."""
    offered = [name for name in offered_methods() if name in chosen or name not in SIX]
    return gr.CheckboxGroup(offered, value=list(chosen), label="Methods")


def _buttons(kind: str) -> tuple[gr.Button, gr.Button, LabStatus]:
    with gr.Column(elem_classes=["dkv-lab-action"]):
        with gr.Row():
            measure = gr.Button(
                "Measure", variant="primary", min_width=80, elem_id=f"dkv-lab-{kind}-run"
            )
            stop = _stop_button(kind)
        status = _idle_status(kind)
    return measure, stop, status


def _upload_buttons(kind: str) -> tuple[gr.UploadButton, gr.Button, LabStatus]:
    """The same, where a measurement starts with a file."""
    with gr.Column(elem_classes=["dkv-lab-action"]):
        with gr.Row():
            measure = gr.UploadButton(
                "Measure a file",
                file_types=[".jsonl"],
                variant="primary",
                min_width=80,
                elem_id=f"dkv-lab-{kind}-run",
            )
            stop = _stop_button(kind)
        status = _idle_status(kind)
    return measure, stop, status


def _stop_button(kind: str) -> gr.Button:
    return gr.Button("Stop", interactive=False, min_width=80, elem_id=f"dkv-lab-{kind}-stop")


def _idle_status(kind: str) -> LabStatus:
    return LabStatus(idle(), elem_id=f"dkv-lab-{kind}-status")


def _part(
    kind: str, measure: gr.Button | gr.UploadButton, stop: gr.Button, status: LabStatus
) -> Part:
    with gr.Column(scale=9, min_width=300):
        panel = LabPanel(recorded(kind), elem_id=f"dkv-lab-{kind}")
    return Part(measure=measure, stop=stop, status=status, panel=panel)


def _wire(
    handlers: LabHandlers, handler: Any, fields: list[Any], part: Part, start: Any = None
) -> None:
    """`start` is the event that begins a measurement, if it is not a click on Measure."""
    start = start or part.measure.click
    start(
        handler,
        fields,
        [part.status, part.panel, part.measure, part.stop],
        **LIGHT,
    )
    part.stop.click(handlers.stop, None, part.status, queue=False, **PRIVATE)
