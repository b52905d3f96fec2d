"""From a cell of the Lab to its run on Explore: the same text, question and settings, made again
from the cell's own seed, put into Explore's form and run there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

import dynamickv as dkv
from app.examples import ASSETS, OWN_TEXT, Example
from app.form import FIELDS
from app.inputs import MAX_NEW_TOKENS, check_texts, whole_number
from app.serving.events import WAIT, address, handlers, placed, said_error, session
from app.serving.status import TOLD, failed, idle, running, waiting
from app.serving.turns import Turns
from app.settings import CAPACITIES, form_defaults, offered_methods

lab = dkv.evaluate
OPENED = ("tabs", "status", "example", *FIELDS)
"""What opening a cell changes, by the widgets' names."""
BESIDE = ("FullKV", "SnapKV", "DynamicKV")
"""Methods that a cell's own is shown beside."""
MOST_TOKENS = 2**20


class Models(Protocol):
    """What opening needs of the model host."""

    def check(self, name: str) -> str:
        """The name, if this page offers it."""

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a cell was measured on."""

    document: str
    question: str
    expected: str = ""
    max_new_tokens: int
    note: str = ""


@handlers
class OpeningHandlers:
    """The event of a cell that is opened."""

    def __init__(
        self,
        models: Models,
        examples: Mapping[str, Example],
        turns: Turns,
        task_folder: Path = ASSETS / "tasks",
    ) -> None:
        self._models, self._examples, self._turns = models, examples, turns
        self._task_folder = task_folder

    def open(
        self, request: gr.Request, event: gr.EventData, document: str, question: str
    ) -> Iterator[list[Any]]:
        """Put a cell's run into Explore's form; `document` and `question` stand there now;
        outputs: `OPENED`.
        """
        yield from self.opened(request, event._data, document, question)

    def opened(
        self, request: gr.Request | None, asked: Any, document: str, question: str
    ) -> Iterator[list[Any]]:
        """The same from what a browser sent."""
        try:
            kind, cell, settings = parts_of(asked)
            model = self._models.check(str(settings.get("model", "")))
            yield _said(running(f"Making the Lab's text for {model}"))
            if kind == "needle":
                with self._turns.join(session(request), address(request)) as ticket:
                    for place in ticket.places(WAIT):
                        yield _said(waiting(place))
                    found = needle_text(self._models.get(model), cell, settings)
            else:
                found = self._text(kind, cell, settings, document, question)
            yield placed(OPENED, form_for(found, cell, settings, model))
        except TOLD as error:
            yield placed(OPENED, {"tabs": gr.update(selected="explore"), "status": failed(error)})
            raise said_error(error) from None

    def _text(
        self, kind: str, cell: Mapping[str, Any], settings: Mapping[str, Any], *shown: str
    ) -> Found:
        if kind == "sweep":
            texts = [shown, *((e.document, e.question) for e in self._examples.values())]
            return sweep_text(texts, settings)
        if kind == "tasks":
            return task_text(self._task_folder, cell)
        return example_text(cell, settings)


def parts_of(asked: Any) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """Kind, cell and settings of what a browser asks to open.

    Raises:
        ValueError: it is none.
    """
    parts = [
        asked.get(name) if isinstance(asked, Mapping) else None for name in ("cell", "settings")
    ]
    kind = asked.get("kind") if isinstance(asked, Mapping) else None
    if kind not in ("needle", "sweep", "tasks", "longbench") or not all(
        isinstance(part, Mapping) for part in parts
    ):
        raise ValueError("This is no cell of the Lab: click one of its charts.")
    return kind, parts[0], parts[1]  # type: ignore[return-value]


def needle_text(
    llm: dkv.LoadedModel, cell: Mapping[str, Any], settings: Mapping[str, Any]
) -> Found:
    """A needle cell's text, invented again from its seed."""
    if settings.get("haystack") != "generated" or settings.get("custom"):
        raise ValueError("This grid hid its facts in texts that are not here: measure it here.")
    depth = cell.get("depth")
    if isinstance(depth, bool) or not isinstance(depth, (int, float)):
        raise ValueError(f"A depth is a number from 0 to 1, got {str(depth)[:40]!r}.")
    length = whole_number("length", cell.get("length"), 1, MOST_TOKENS)
    longest = whole_number("max_new_tokens", settings.get("max_new_tokens"), 1, MAX_NEW_TOKENS)
    grid = lab.needle.NeedleGrid(
        lengths=(length,),
        depths=(float(depth),),
        needles=whole_number("needles", settings.get("needles"), 1, 8),
        seed=whole_number("seed", settings.get("seed"), 0, 2**31),
        max_new_tokens=longest,
    )
    sample = whole_number("sample", cell.get("sample"), 0, 1000)
    # JSON writes 0.0 as 0 in a browser, and a text's seed is made of the number as it is written.
    unit = {"length": length, "depth": float(depth), "sample": sample}
    document, hidden = lab.needle.NeedleExperiment(llm, grid).document(unit)
    return Found(
        document=document,
        question=hidden.question,
        expected=hidden.expected[0],
        max_new_tokens=longest,
        note=f"text {sample + 1} of this cell",
    )


def sweep_text(texts: list[tuple[str, ...]], settings: Mapping[str, Any]) -> Found:
    """A sweep's document and question, where they stand in the form or are an example's."""
    longest = whole_number("max_new_tokens", settings.get("max_new_tokens"), 1, MAX_NEW_TOKENS)
    for document, question in texts:
        if lab.sweep.prompt_digest(document, question) == settings.get("prompt"):
            return Found(document=document, question=question, max_new_tokens=longest)
    raise ValueError(
        "The text that this sweep was measured on no longer stands on Explore: put it back, or "
        "measure again."
    )


def task_text(folder: Path, cell: Mapping[str, Any]) -> Found:
    """The first document that meets this kind of question."""
    texts = lab.tasks.read_documents(folder)
    own = lab.tasks.read_questions(folder, texts)
    shared = lab.tasks.shared_questions()
    kind = cell.get("kind")
    for name, text in texts.items():
        question = own.get(name, shared).get(str(kind))
        if question:
            return Found(
                document=text, question=question, max_new_tokens=64, note=f"document {name}"
            )
    raise ValueError(f"No document of the tasks is asked {str(kind)[:40]!r}: click another row.")


def example_text(cell: Mapping[str, Any], settings: Mapping[str, Any]) -> Found:
    """An uploaded example's text, which its panel brought along."""
    pair = cell.get("text")
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError("This example's text is not here: measure your file again.")
    document, question = check_texts(*pair)
    longest = whole_number("max_new_tokens", settings.get("max_new_tokens"), 1, 4096)
    return Found(
        document=document,
        question=question,
        max_new_tokens=min(longest, MAX_NEW_TOKENS),
        note="in the chat template, which the measurement left out",
    )


def form_for(
    found: Found, cell: Mapping[str, Any], settings: Mapping[str, Any], model: str
) -> dict[str, Any]:
    """What opening changes: the form asks for exactly this run.

    Raises:
        ValueError: the cell is of a method or a capacity that the form has not.
    """
    method = cell.get("method", settings.get("method", "DynamicKV"))
    if method not in offered_methods():
        raise ValueError(f"Unknown method {str(method)[:40]!r}; click another cell.")
    capacity = cell.get("capacity", settings.get("capacity"))
    size = {}
    if capacity is not None:
        size = {"capacity": whole_number("capacity", capacity, *CAPACITIES)}
    settings_ = {name: value for name, value in form_defaults().items() if name in FIELDS}
    return {
        "tabs": gr.update(selected="explore"),
        "status": idle("The Lab's run:", found.note) if found.note else idle("The Lab's run."),
        "example": OWN_TEXT,
        **settings_,
        **size,
        "document": found.document,
        "question": found.question,
        "expected": found.expected,
        "methods": [name for name in offered_methods() if name in (*BESIDE, method)],
        "max_new_tokens": found.max_new_tokens,
        "truncate": False,
        "question_aware": True,
        "model": model,
    }


def _said(status: dict[str, Any]) -> list[Any]:
    """Explore, with what goes on there."""
    return placed(OPENED, {"tabs": gr.update(selected="explore"), "status": status})
