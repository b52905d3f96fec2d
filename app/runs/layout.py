"""The Runs & API tab: run files, which are shown on Explore once opened, and the same comparison
from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from app.components import Readout
from app.serving.events import LIGHT

from .handlers import OPENED, WITHOUT_TEXT, RunsHandlers
from .view_model import method_cards

LANGUAGES: tuple[tuple[str, str, Any], ...] = (
    ("python", "Python", "python"),
    ("client", "gradio_client", "python"),
    ("curl", "curl", "shell"),
    ("mcp", "MCP client settings (the page needs gradio[mcp])", "json"),
)


def build_runs(handlers: RunsHandlers, widgets: Mapping[str, Any], tab: gr.Tab) -> None:
    """The tab's content; `widgets` are the page's `tabs` and Explore's by name."""
    with gr.Row(elem_classes=["dkv-split"]):
        with gr.Column(scale=2, min_width=300):
            opened, note = build_files()
        with gr.Column(scale=3, min_width=300):
            boxes = build_code()
    known = {**widgets, "note": note}
    opened.upload(handlers.open_run, opened, [known[name] for name in OPENED], **LIGHT)
    tab.select(handlers.snippets, [known[name] for name in WITHOUT_TEXT], boxes, **LIGHT)


def build_files() -> tuple[gr.UploadButton, Readout]:
    """Save and open: the button that opens a file, and what is said of it."""
    gr.Markdown(
        "## Run files\nA run file holds the prompt, what every method kept, "
        "the answers and the measurements. It opens here without any model. "
        "It contains your document in clear, unless you save it without the text: then "
        "every letter is a dot, and all numbers stay."
    )
    with gr.Row():
        save_button("Save the run on screen", "dkv-save", "saveRun(true)")
        save_button("Save without the text", "dkv-save-bare", "saveRun(false)")
    with gr.Row():
        save_button("Save as one HTML page", "dkv-save-page", "savePage()")
        opened = gr.UploadButton(
            "Open a run file", file_types=[".json", ".gz"], elem_id="dkv-open", min_width=160
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
    return opened, note


def save_button(label: str, elem_id: str, script: str) -> None:
    """A button that the browser serves alone: the run is there already."""
    button = gr.Button(label, elem_id=elem_id, min_width=160)
    button.click(None, js=f"() => {{ window.DynamicKV.{script}; }}", api_visibility="private")


def build_code() -> list[gr.Code]:
    """The same comparison as code, one box per language."""
    gr.Markdown(
        "## The same comparison from code\nWith the values of the form. Save your "
        "document as `document.txt` beside it. The endpoints take the methods' own "
        "defaults for advanced settings, and let the scores see the question."
    )
    return [
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
        for key, label, language in LANGUAGES
    ]
