"""What the Lab does when asked: measure, tell how far it is, stop. What was measured of a needle
grid or of tasks is kept on disk, so that the same settings go on where they were stopped; texts of
users are not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

import dynamickv as dkv
from app.examples import ASSETS, Example
from app.inputs import MAX_NEW_TOKENS, build_request, whole_number
from app.lab.view_model import (
    Payload,
    longbench_panel,
    needle_panel,
    source_words,
    sweep_panel,
    tasks_panel,
)
from app.serving.comparisons import CHARACTERS_PER_TOKEN
from app.serving.events import WAIT, address, busy_buttons, handlers, idle_buttons, session
from app.serving.speed import Speed
from app.serving.status import idle, running, told, waiting
from app.serving.stops import Stops
from app.serving.turns import Turns
from app.serving.zero_gpu import is_zero_gpu
from app.uploads import MAX_EXAMPLES, read_examples_upload
from app.wording import seconds

log = logging.getLogger(__name__)
lab = dkv.evaluate
MOST_CELLS = 2000
MOST_NUMBERS = 12
FILE_NAME = "The file's name"
"""A choice among tasks."""
Build = Callable[[list[dict[str, Any]], str], Payload]
Outputs = tuple[Any, ...]
"""Status, panel, Measure, Stop."""


class Models(Protocol):
    """What the Lab needs of the model host."""

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model."""


@handlers
class LabHandlers:
    """The Lab's events, bound to the page's models and turns."""

    def __init__(
        self,
        models: Models,
        examples: Iterable[Example],
        turns: Turns,
        folder: Path | None = None,
        task_folder: Path = ASSETS / "tasks",
    ) -> None:
        self._models, self._turns = models, turns
        self._folder, self._task_folder = folder, task_folder
        self._stops = Stops()
        self._speed = Speed.recorded(examples)

    def stop(self, request: gr.Request) -> dict[str, Any]:
        """Ask this tab's measurements to end; output: status."""
        self._stops.ask(session(request))
        return {"state": "running", "message": "Stopping …", "detail": "", "stopping": True}

    def needle(
        self,
        request: gr.Request,
        model: str,
        methods: list[str],
        capacities: str,
        lengths: str,
        depths: float,
        samples: float,
        needles: float,
    ) -> Iterator[Outputs]:
        """Measure a needle grid."""

        def work(stop: threading.Event) -> Generator[Outputs, None, None]:
            chosen, grid, guess = self._grid(methods, capacities, lengths, depths, samples, needles)
            lab.metrics.require_libraries()
            yield running(f"Loading {model}"), gr.skip(), *busy_buttons()
            llm = self._models.get(model)
            experiment = lab.needle.NeedleExperiment(llm, grid)
            yield from self._measure(
                llm, experiment, chosen, stop, guess, "cells",
                lambda rows, source: needle_panel(
                    lab.summary.needle_summary(rows), source, experiment.settings
                ),
                self._kept("needle", experiment.settings),
            )  # fmt: skip

        yield from self._guarded(request, "needle", work)

    def needle_time(self, *form: Any) -> dict[str, str]:
        """How long the grid that the form asks for will take, without its model; output: its
        readout, which is empty where Measure would refuse the form.
        """
        try:
            _, _, guess = self._grid(*form)
        except ValueError:
            guess = ""
        return {"value": "", "note": guess}

    def _grid(
        self,
        methods: list[str],
        capacities: str,
        lengths: str,
        depths: float,
        samples: float,
        needles: float,
    ) -> tuple[list[dkv.CompressionMethod], lab.needle.NeedleGrid, str]:
        """The methods and the grid that a form asks for, and how long they will take."""
        sizes, longest = numbers("capacity", capacities), numbers("length", lengths)
        chosen = lab.methods_at(listed(methods), sizes)
        grid = lab.needle.NeedleGrid(
            lengths=tuple(longest),
            depths=lab.needle.even_depths(whole_number("depths", depths, 1, 21)),
            samples=whole_number("samples", samples, 1, 50),
            needles=whole_number("needles", needles, 1, 8),
        )
        cells = len(grid.lengths) * len(grid.depths) * grid.samples
        if cells > MOST_CELLS:
            raise ValueError(f"{cells:,} cells are more than {MOST_CELLS:,}; choose fewer")
        each = sum(longest) * len(grid.depths) * grid.samples
        mass = any(method.needs_mass for method in chosen)
        return chosen, grid, self._guess(each, cells * len(chosen), grid.max_new_tokens, mass)

    def sweep(
        self,
        request: gr.Request,
        document: str,
        question: str,
        model: str,
        methods: list[str],
        new_tokens: float,
    ) -> Iterator[Outputs]:
        """Measure every capacity on the document of Explore."""

        def work(stop: threading.Event) -> Generator[Outputs, None, None]:
            longest = whole_number("new tokens", new_tokens, 1, MAX_NEW_TOKENS)
            build_request(document, question, ["FullKV"], longest, {"capacity": 128})
            chosen = lab.methods_at([m for m in listed(methods) if m != "FullKV"], [16])
            yield running(f"Loading {model}"), gr.skip(), *busy_buttons()
            llm = self._models.get(model)
            experiment = lab.sweep.SweepExperiment(llm, document, question, max_new_tokens=longest)
            yield running("Reading the prompt"), gr.skip(), *busy_buttons()
            experiment.prepare(any(m.needs_mass for m in chosen), stop=stop.is_set)
            # The journal would hold answers about somebody's text: it goes when this ends.
            with tempfile.TemporaryDirectory(prefix="dynamickv-") as folder:
                yield from self._measure(
                    llm, experiment, chosen, stop, "", "capacities",
                    lambda rows, source: sweep_panel(
                        lab.sweep.sweep_summary(rows), source, experiment.settings, question
                    ),
                    lab.Journal(Path(folder) / "sweep.jsonl"),
                )  # fmt: skip

        yield from self._guarded(request, "sweep", work)

    def tasks(
        self, request: gr.Request, model: str, method: str, capacity: float
    ) -> Iterator[Outputs]:
        """Ask every document of assets/tasks the kinds of question that suit it."""

        def work(stop: threading.Event) -> Generator[Outputs, None, None]:
            size = whole_number("capacity", capacity, 16, 2048)
            chosen = lab.methods_at(listed([method]), [size])
            yield running(f"Loading {model}"), gr.skip(), *busy_buttons()
            llm = self._models.get(model)
            texts = lab.tasks.read_documents(self._task_folder)
            own = lab.tasks.read_questions(self._task_folder, texts)
            experiment = lab.tasks.TaskExperiment(llm, texts, own=own)
            characters = sum(map(experiment.size, experiment.units()))
            guess = self._guess(round(characters / CHARACTERS_PER_TOKEN), 0, 0)
            yield from self._measure(
                llm, experiment, chosen, stop, guess, "questions",
                lambda rows, source: tasks_panel(
                    [lab.tasks.tasks_summary(rows, chosen[0].name)],
                    source,
                    {**experiment.settings, "capacity": size},
                ),
                self._kept("tasks", experiment.settings),
            )  # fmt: skip

        yield from self._guarded(request, "tasks", work)

    def longbench(
        self,
        request: gr.Request,
        path: str | None,
        model: str,
        task: str,
        methods: list[str],
        capacities: str,
        limit: float,
    ) -> Iterator[Outputs]:
        """Score the first examples of an uploaded file, which is read and deleted at once."""
        if path is None:
            yield gr.skip(), gr.skip(), *idle_buttons()
            return

        def work(stop: threading.Event) -> Generator[Outputs, None, None]:
            most = whole_number("examples", limit, 1, MAX_EXAMPLES)
            examples = read_examples_upload(path, known_task(task), most)
            chosen = lab.methods_at(listed(methods), numbers("capacity", capacities))
            lab.metrics.require_libraries()
            protocol = lab.longbench.Protocol.official()
            lengths = [protocol.answer_length(example) for example in examples]
            yield running(f"Loading {model}"), gr.skip(), *busy_buttons()
            llm = self._models.get(model)
            experiment = lab.longbench.LongBenchExperiment(llm, examples, protocol)
            room = llm.geometry.max_positions
            tokens = sum(
                min(len(protocol.prompt(example)) / CHARACTERS_PER_TOKEN, room)
                for example in examples
            )
            guess = self._guess(round(tokens), len(examples) * len(chosen), max(lengths))
            settings = {**experiment.settings, "max_new_tokens": max(lengths)}

            def build(rows: list[dict[str, Any]], source: str) -> Payload:
                summary = lab.summary.longbench_summary(rows)
                worst = {line["worst"] for line in summary}
                parts = {str(e.id): protocol.parts(e) for e in examples if str(e.id) in worst}
                texts = {name: list(pair) for name, pair in parts.items() if pair}
                return longbench_panel(summary, source, settings, texts)

            # The journal would hold answers about somebody's text: it goes when this ends.
            with tempfile.TemporaryDirectory(prefix="dynamickv-") as folder:
                yield from self._measure(
                    llm, experiment, chosen, stop, guess, "examples",
                    build,
                    lab.Journal(Path(folder) / "longbench.jsonl"),
                )  # fmt: skip

        try:
            yield from self._guarded(request, "longbench", work)
        finally:
            Path(path).unlink(missing_ok=True)

    def _measure(
        self,
        llm: dkv.LoadedModel,
        experiment: lab.Experiment,
        methods: Sequence[dkv.CompressionMethod],
        stop: threading.Event,
        guess: str,
        nouns: str,
        build: Build,
        journal: lab.Journal,
    ) -> Iterator[Outputs]:
        source = f"Measured here {source_words(lab.circumstances(llm))}"
        step = None
        for step in lab.run(experiment, methods, journal, stop=stop.is_set):
            left = (
                guess if step.seconds_left is None else f"about {seconds(step.seconds_left)} left"
            )
            status = running(
                f"Measured {step.done} of {step.total} {nouns}"
                if step.total
                else "All is measured",
                step.done / max(step.total, 1),
            )
            rows = lab.rows_of(journal, experiment.units(), methods)
            shown = build(rows, source) if rows else gr.skip()
            yield {**status, "detail": left}, shown, *busy_buttons()
        stopped = step is not None and step.done < step.total
        words = "Stopped: what was measured is kept, Measure goes on from here."
        yield idle(words if stopped else "Done."), gr.skip(), *idle_buttons()

    def _guarded(
        self,
        request: gr.Request,
        kind: str,
        work: Callable[[threading.Event], Generator[Outputs, None, None]],
    ) -> Iterator[Outputs]:
        stop = self._stops.begin(session(request), kind)
        try:
            if is_zero_gpu():
                raise ValueError(
                    "This Space lends its GPU for seconds at a time: measure on a machine of your "
                    f"own with python -m dynamickv {kind}."
                )
            yield from self._in_turns(request, stop, work(stop))
        except lab.Stopped:
            yield idle("Stopped."), gr.skip(), *idle_buttons()
        except Exception as error:
            remedy = "choose shorter prompts or fewer methods"
            status = told(error, "a measurement failed", "measurement", remedy)
            field = error.field if isinstance(error, FieldError) else ""
            yield {**status, "field": field}, gr.skip(), *idle_buttons()
        finally:
            self._stops.end(stop)

    def _in_turns(
        self, request: gr.Request, stop: threading.Event, steps: Generator[Outputs, None, None]
    ) -> Iterator[Outputs]:
        """A turn for each step: a measurement may take hours, and others go in between."""
        with closing(steps):
            while True:
                with self._turns.join(session(request), address(request), stop=stop) as ticket:
                    for place in ticket.places(WAIT):
                        yield waiting(place), gr.skip(), *busy_buttons()
                    shown = next(steps, None)
                if shown is None:
                    return
                yield shown

    def _guess(self, prefill_tokens: int, answers: int, new_tokens: int, mass: bool = False) -> str:
        if self._speed is None:
            return ""
        return self._speed.estimate(prefill_tokens, answers, new_tokens, mass).words()

    def _kept(self, kind: str, settings: dict[str, Any]) -> lab.Journal:
        """The journal of these settings."""
        folder = self._folder or lab.results_folder()
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return lab.Journal(folder / f"{kind}-{name}.jsonl")


class FieldError(ValueError):
    """What is wrong with one field of a form, which the page then marks."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


def numbers(name: str, text: str) -> list[int]:
    """A list such as "64, 128".

    Raises:
        FieldError: no numbers, too many, or one that is out of bounds.
    """
    try:
        found = sorted({int(part) for part in str(text).replace(",", " ").split()})
    except ValueError:
        found = []
    if not found or found[0] < 1 or len(found) > MOST_NUMBERS:
        raise FieldError(
            name,
            f"{name} takes 1 to {MOST_NUMBERS} whole numbers, such as 64, 128; "
            f"got {str(text)[:40]!r}",
        )
    return found


def known_task(name: Any) -> str | None:
    """A task of LongBench, or None for the file's name.

    Raises:
        ValueError: neither.
    """
    if name == FILE_NAME:
        return None
    if name not in lab.datasets.longbench_tasks():
        raise ValueError(f"there is no task {str(name)[:40]!r}; choose one from the list")
    return str(name)


def listed(methods: Any) -> list[str]:
    """Method names; anything else a browser may send is refused."""
    if not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
        raise ValueError("methods must be a list of names; tick at least one")
    return methods
