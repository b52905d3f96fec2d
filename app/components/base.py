"""Components of the page: static templates plus one script each; data arrives as one JSON string in
`value`.

Gradio pastes templates into JavaScript and runs them, so no text of a user may ever be part of one.
Templates here are files without placeholders (checked on import by a test), and scripts write texts
with `textContent` only.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr

from app.theme import css_variables

STATIC = Path(__file__).parent / "static"
# Order matters: core and retention define what the others use.
SCRIPTS = (
    "core",
    "retention",
    "trace_store",
    "text_layer",
    "minimap",
    "words",
    "document_words",
    "document_view",
    "word_view",
    "evidence",
    "what_if",
    "live_bars",
    "figure_view",
    "layer_map",
    "film",
    "forgetting",
    "answer_cards",
    "status_line",
    "model_chip",
    "readout",
    "keys",
)
PAGE_SCRIPTS = (
    "keep",
    "links",
    "exports",
    "pictures",
    "onward",
    "gallery",
    "history",
    "lab_panel",
    "learn",
    "learn_figures",
    "learn_choice",
    "learn_pair",
    "tour",
    "hall",
)
"""Those that a page without a server has no use for."""
# Gradio looks for the names of a component's own events in this text.
MOUNT = """
// events: "answer" "read" "open" "smallest" "ask" "restore"
(function start() {
  if (window.DynamicKV) window.DynamicKV.mount("%s", element, props, watch, { server, trigger });
  else requestAnimationFrame(start);
})();
"""


def dumps(value: Any) -> str:
    """The one compact JSON string that a component receives."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Component(gr.HTML):
    """A gr.HTML with a fixed template and a script registered under `view`."""

    view: ClassVar[str]
    template: ClassVar[str]

    def __init__(self, payload: Any = None, **options: Any) -> None:
        super().__init__(
            value=None if payload is None else dumps(payload),
            html_template=read(f"{self.template}.html"),
            css_template="",
            js_on_load=MOUNT % self.view,
            apply_default_css=False,
            **options,
        )

    def postprocess(self, value: Any) -> str | None:
        """Payloads become the one JSON string the script parses; strings are taken as that
        already.
        """
        return value if value is None or isinstance(value, str) else dumps(value)

    def get_block_name(self) -> str:
        """Gradio finds the browser side of subclasses by this name."""
        return "html"


@lru_cache(maxsize=64)
def read(name: str) -> str:
    """A file of the static folder."""
    return (STATIC / name).read_text(encoding="utf-8").strip()


def head() -> str:
    """Styles and scripts of all components, for the page's <head>: no request of their own, no
    CDN.
    """
    scripts = "\n".join(read(f"{name}.js") for name in (*SCRIPTS, *PAGE_SCRIPTS))
    return f"<style>\n{styles()}\n{read('learn.css')}\n</style>\n<script>\n{scripts}\n</script>"


def styles() -> str:
    """The palette and the sizes."""
    sheets = (
        read(f"{name}.css") for name in ("explorer", "stage", "film", "forgetting", "lab", "hall")
    )
    return "\n".join([css_variables(), *sheets])
