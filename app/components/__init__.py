"""The page's own components, one class each."""

from __future__ import annotations

from typing import Any

from .base import Component, dumps, head
from .offline import offline_page


class ModelChip(Component):
    """Title of the page and state of the model."""

    view, template = "model", "model_chip"


class StatusLine(Component):
    """What a run is doing, or what went wrong."""

    view, template = "status", "status_line"


class Readout(Component):
    """A number with its meaning."""

    view, template = "readout", "readout"


class AnswerCards(Component):
    """The answers side by side."""

    view, template = "answers", "answer_cards"


class TraceStore(Component):
    """Receives a run record and hands it to the views below; shows nothing."""

    view, template = "store", "trace_store"


class DocumentView(Component):
    """The prompt's text with the kept tokens marked."""

    view, template = "document", "document_view"


class WordView(Component):
    """An answer word: its probability under both caches, and how much of what it read survives."""

    view, template = "word", "word_view"


class Evidence(Component):
    """A drawer: why a token was kept or dropped, and in which layers a passage survived."""

    view, template = "evidence", "evidence"


class WhatIf(Component):
    """Other settings tried on the stored prompt: predicted at once, answered on request.

    Its events `answer` and `read` carry what to answer with, and whose prompt to read.
    """

    view, template = "whatif", "what_if"


class Film(Component):
    """What every run holds after each layer that is read: play, step, skip."""

    view, template = "film", "film"


class Onward(Component):
    """On from a run: its smallest capacity, another question, earlier runs.

    Its events `smallest`, `ask` and `restore` carry the key of a run.
    """

    view, template = "onward", "onward"


class Forgetting(Component):
    """What is forgotten while an answer grows, token by token; hidden where nothing is."""

    view, template = "forgetting", "forgetting"


class LayerMap(Component):
    """Retention of all layers and positions on one canvas."""

    view, template = "map", "layer_map"


class FigureView(Component):
    """Every registered Plotly view, one tab each."""

    view, template = "figures", "figure_view"

    def __init__(self, titles: list[dict[str, str]], **options: Any) -> None:
        super().__init__(None, titles=dumps(titles), **options)


class Learn(Component):
    """The lessons: static text, and figures of recorded runs that the tab fetches itself."""

    view, template = "learn", "learn"


class Gallery(Component):
    """Recorded losses as cards, each with an address."""

    view, template = "gallery", "gallery"


class LabPanel(Component):
    """One measurement of the Lab: sentences, a chart, tables, a CSV file."""

    view, template = "lab", "lab_panel"


class LabStatus(Component):
    """How far a measurement is."""

    view, template = "labstatus", "status_line"


__all__ = [
    "AnswerCards",
    "Component",
    "DocumentView",
    "Evidence",
    "FigureView",
    "Film",
    "Forgetting",
    "Gallery",
    "LabPanel",
    "LabStatus",
    "LayerMap",
    "Learn",
    "ModelChip",
    "Onward",
    "Readout",
    "StatusLine",
    "TraceStore",
    "WhatIf",
    "WordView",
    "dumps",
    "head",
    "offline_page",
]
