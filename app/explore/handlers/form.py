"""The form: examples, links and uploads put into it, and what it says while somebody types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import gradio as gr

import dynamickv as dkv
from app.examples import OWN_TEXT, Example
from app.explore import view_model as vm
from app.form import FIELDS, form_of
from app.serving.events import handlers, page_error, placed
from app.serving.model_host import ModelState, PromptSize
from app.serving.shown import Shown
from app.serving.speed import MASS_RATIO
from app.serving.status import idle
from app.uploads import read_text_upload

PICKED = ("cards", "store", "status", *FIELDS)
"""What an example changes, by the widgets' names."""
LINKED = ("example", *PICKED)


class Models(Protocol):
    """What the form needs of the model host."""

    names: list[str]

    def measure(self, name: str, document: str, question: str) -> PromptSize | None:
        """Length of a prompt, or None while the model is not loaded."""

    def ready(self, name: str) -> dkv.LoadedModel | None:
        """The model if it is loaded already."""

    def state(self, name: str | None = None) -> ModelState:
        """How a model stands."""


@handlers
class FormHandlers:
    """Events of the form."""

    def __init__(
        self,
        models: Models,
        examples: Mapping[str, Example],
        shown: Shown,
        busy: Callable[[gr.Request], bool] = lambda _: False,
        mass_ratio: Callable[[], float] = lambda: MASS_RATIO,
    ) -> None:
        """`busy`: whether a visitor's run is on; `mass_ratio` as `Comparisons` knows it."""
        self._models, self._examples, self._shown = models, examples, shown
        self._busy, self._mass_ratio = busy, mass_ratio

    def count(self, document: str, question: str, model: str) -> dict[str, Any]:
        """Live token count; output: its readout."""
        said = vm.uncountable(document)
        if said is not None:
            return said
        asked = question if question and question.strip() else "?"
        return vm.counted(document, self._models.measure(model, document, asked))

    def capacity_line(
        self, capacity: Any, counted: str | None, granularity: str, model: str
    ) -> dict[str, str]:
        """What the capacity means; `counted` is the token readout's JSON; output: the capacity's
        readout.
        """
        return vm.capacity_readout(
            self._geometry(model), capacity, vm.tokens_of(counted), granularity
        )

    def _geometry(self, model: str) -> dict[str, int] | None:
        """Sizes of the model, or of the recorded runs' model until it is loaded."""
        llm = self._models.ready(model)
        if llm is not None:
            return asdict(llm.geometry) | {"bytes_per_value": llm.held_dtype.itemsize}
        trace = next((e.trace for e in self._examples.values() if e.trace), None)
        if trace is None:
            return None
        return asdict(trace.model) | {"bytes_per_value": vm.bytes_per_value(trace)}

    def pick(self, example_id: str, request: gr.Request = None) -> list[Any]:  # type: ignore[assignment]
        """Show an example; outputs: `PICKED`. While a run is on it comes into the form alone, and
        what is watched stays.
        """
        changes = self._picked(example_id)
        if self._busy(request):
            changes = {name: value for name, value in changes.items() if name in FIELDS}
        return placed(PICKED, changes)

    def _picked(self, example_id: str) -> dict[str, Any]:
        if example_id == OWN_TEXT:
            return {
                "status": idle("Paste or upload your text."),
                "document": "",
                "question": "",
                "expected": "",
            }
        example = self._example(example_id)
        if example is None:
            return {}
        if example.trace is None:
            return {
                "status": idle("No recorded run for this example: press Run."),
                "document": example.document,
                "question": example.question,
                "capacity": example.capacity,
            }
        cards, store = self._shown.example(example)
        form = form_of(example.trace, self._models.names)
        longest = {"max_new_tokens": example.max_new_tokens} if example.max_new_tokens else {}
        return {"cards": cards, "store": store, "status": idle(), **form, **longest}

    def link(self, request: gr.Request) -> list[Any]:
        """Show the example and set the capacity that the page's address names; outputs:
        `LINKED`.
        """
        wanted = request.query_params.get("ex")
        example = self._example(wanted)
        if example is None:
            return placed(LINKED, {})
        there = wanted == next(iter(self._examples))
        changes = {} if there else {"example": wanted, **self._picked(example.id)}
        capacity = vm.linked_capacity(request.query_params.get("b"))
        if capacity is not None:
            changes["capacity"] = capacity
            recorded = vm.capacity_of(example.trace) if example.trace is not None else None
            if recorded not in (None, capacity):
                changes["status"] = idle(
                    f"The link asks for capacity {capacity:,}; the run shown was recorded at "
                    f"{recorded:,}.",
                    f"Press Run for {capacity:,}.",
                )
        return placed(LINKED, changes)

    def own_text(self, document: str, example_id: str | None) -> Any:
        """Let go of the example's title when the text is not its any more; output: example."""
        example = self._example(example_id)
        return gr.skip() if example is None or example.is_document(document) else OWN_TEXT

    def ready(self, document: str, question: str, request: gr.Request) -> Any:
        """Whether there is something to run; output: Run, which is left alone while it runs."""
        if self._busy(request):
            return gr.skip()
        return gr.update(interactive=all(text and text.strip() for text in (document, question)))

    def model_state(self, model: str) -> dict[str, Any]:
        """How the chosen model stands; output: the page's head."""
        return asdict(self._models.state(model))

    def price(self, methods: list[str]) -> dict[str, str]:
        """What reading all attention costs the chosen methods, by the last run that did; output:
        its readout.
        """
        return vm.price(self._mass_ratio(), methods)

    def upload(self, path: str | None) -> Any:
        """Read an uploaded text; output: document."""
        if path is None:
            return gr.skip()
        try:
            return read_text_upload(path)
        except (ValueError, OSError) as error:
            raise page_error(error) from None

    @staticmethod
    def lock_reference(methods: list[str]) -> Any:
        """FullKV stays chosen: it is what the others are compared with.

        Nothing is sent back where it is: the answer would undo what was ticked in the meantime.
        """
        if "FullKV" in methods:
            return gr.skip()
        return [name for name in dkv.METHODS if name == "FullKV" or name in methods]

    def _example(self, example_id: object) -> Example | None:
        return self._examples.get(example_id) if isinstance(example_id, str) else None
