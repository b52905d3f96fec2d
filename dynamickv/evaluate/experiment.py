"""Measure many units, such as a needle grid's cells, with many methods each: one prefill per unit,
resumable, shared among processes.
 A unit is a small JSON object that names it. What was measured is in a journal: one line a unit,
with one entry a method. Methods, capacities and units may be added later; only what is missing is
measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dynamickv.compare import compare_stream
from dynamickv.evaluate.journal import Journal
from dynamickv.evaluate.share import Share
from dynamickv.methods import METHODS, CompressionMethod, build_method
from dynamickv.methods.registry import require_known
from dynamickv.models import LoadedModel
from dynamickv.record.agreement import with_agreement
from dynamickv.record.events import RunFinished
from dynamickv.record.trace import Run
from dynamickv.records import Prefill

Unit = dict[str, Any]
Row = dict[str, Any]
Stop = Callable[[], bool]
UNSAID = {"precision": "exact"}
"""Settings of journals that do not name them: those from before there was a choice."""


class Stopped(Exception):
    """The work was asked to stop; what is in the journal stays."""


class Experiment(Protocol):
    """What is measured, and on what."""

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for results to belong together, JSON-ready."""

    def units(self) -> list[Unit]:
        """Everything to measure, in order; the same in every process."""

    def size(self, unit: Unit) -> float:
        """How much work a unit is, in a measure of the experiment's own."""

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """Measure one unit; {"runs": one entry a method, ...}."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One unit is done, or nothing yet where `row` is None."""

    row: Row | None
    done: int
    total: int
    """Units of this process that were missing at the start."""
    seconds_left: float | None
    """Estimate from the units done so far, by size."""


def methods_at(
    names: Iterable[str], capacities: Iterable[int], **settings: Any
) -> list[CompressionMethod]:
    """Every method at every capacity, those without one once, in the registry's order.

    Raises:
        ValueError: an unknown name, no names, no capacities, or a bad parameter.
    """
    wanted, sizes = list(names), sorted(set(capacities))
    require_known(wanted)
    if not wanted:
        raise ValueError(f"no method to measure; choose from {', '.join(METHODS)}")
    if not sizes:
        raise ValueError("no capacity to measure; give at least one, such as 128")
    chosen: list[CompressionMethod] = []
    for name in (name for name in METHODS if name in wanted):
        if METHODS[name].capabilities.capacity:
            chosen += [build_method(name, capacity=size, **settings) for size in sizes]
        else:
            chosen.append(build_method(name, **settings))
    return chosen


def run(
    experiment: Experiment,
    methods: Sequence[CompressionMethod],
    journal: Journal,
    share: Share | None = None,
    stop: Stop = lambda: False,
) -> Generator[Measured, None, None]:
    """Measure what the journal lacks, this process's share of it, telling each unit that is done.

    Ends early, without an error, once `stop` says so.

    Raises:
        ValueError: the journal holds results of other settings.
        OSError: a result could not be written; the earlier ones are intact.
    """
    share = share or Share()
    units = experiment.units()
    held = journal.read()
    require_same_settings(held, experiment.settings, journal)
    missing = share.mine(_missing(units, methods, held))
    sizes = [experiment.size(units[index]) for index, _ in missing]
    if missing and not journal.begun:
        journal.append({"settings": experiment.settings})
    start, done_size = time.perf_counter(), 0.0
    yield Measured(None, 0, len(missing), None)
    for done, (index, places) in enumerate(missing):
        began = time.perf_counter()
        try:
            measured = experiment.measure(units[index], [methods[p] for p in places], stop)
        except Stopped:
            return
        seconds = time.perf_counter() - began
        row = {"unit": units[index], **measured, "seconds": round(seconds, 3)}
        journal.append(row)
        done_size += sizes[done]
        pace = (time.perf_counter() - start) / done_size if done_size else 0.0
        yield Measured(row, done + 1, len(missing), pace * sum(sizes[done + 1 :]))


def rows_of(
    journal: Journal,
    units: Sequence[Unit],
    methods: Sequence[CompressionMethod] | None = None,
) -> list[Row]:
    """What the journal holds of these units: one row a unit with every run once, in their order.

    With `methods` only their runs, and only units that have some.
    """
    merged: dict[str, Row] = {}
    for row in journal.read():
        if "unit" not in row:
            continue
        name = key(row["unit"])
        if name not in merged:
            merged[name] = {**row, "runs": list(row["runs"])}
            continue
        known = {_method_key(run) for run in merged[name]["runs"]}
        merged[name]["runs"] += [run for run in row["runs"] if _method_key(run) not in known]
    rows = [merged[key(unit)] for unit in units if key(unit) in merged]
    if methods is None:
        return rows
    asked = {key([method.name, method.parameters]) for method in methods}
    mine = [{**row, "runs": [r for r in row["runs"] if _method_key(r) in asked]} for row in rows]
    return [row for row in mine if row["runs"]]


def require_same_settings(rows: Sequence[Row], settings: dict[str, Any], journal: Journal) -> None:
    """Raise ValueError if the rows were measured with other settings."""
    wanted = UNSAID | settings
    for held in (UNSAID | row["settings"] for row in rows if "settings" in row):
        for name, value in held.items():
            if wanted.get(name) != value:
                raise ValueError(
                    f"{journal.path} was measured with {name}={value!r} and not "
                    f"{wanted.get(name)!r}; choose another output or the same {name}"
                )


def _missing(
    units: Sequence[Unit], methods: Sequence[CompressionMethod], rows: Sequence[Row]
) -> list[tuple[int, list[int]]]:
    """(place of the unit, places of its methods) that no row holds."""
    held: dict[str, set[str]] = {}
    for row in rows:
        if "unit" in row:
            names = {_method_key(run) for run in row["runs"]}
            held[key(row["unit"])] = held.get(key(row["unit"]), set()) | names
    wanted = [key([method.name, method.parameters]) for method in methods]
    missing = []
    for index, unit in enumerate(units):
        known = held.get(key(unit), set())
        places = [place for place, name in enumerate(wanted) if name not in known]
        if places:
            missing.append((index, places))
    return missing


def answers(
    llm: LoadedModel,
    prefill: Prefill,
    methods: Sequence[CompressionMethod],
    max_new_tokens: int,
    stop: Stop = lambda: False,
    question: str | None = None,
) -> list[Run]:
    """Every method's answer from one prefill, with agreement where FullKV is among them; all
    runs share a pass where they can.

    Args:
        question: for a prefill of a document alone.

    Raises:
        Stopped: as soon as `stop` says so.
    """
    finished: dict[int, Run] = {}
    events = compare_stream(
        llm,
        question=question,
        prefill=prefill,
        methods=methods,
        max_new_tokens=max_new_tokens,
        full_apart=False,
        should_stop=stop,
    )
    for event in events:
        if isinstance(event, RunFinished):
            if event.record.finish_reason == "cancelled":
                raise Stopped
            finished[event.run] = event.record
        if len(finished) == len(methods):
            # What follows holds every cache against FullKV's words, one more pass each.
            break
    events.close()
    return with_agreement([finished[index] for index in range(len(methods))])


def of_model(llm: LoadedModel) -> dict[str, str]:
    """What every experiment's settings say of the model."""
    known = {"model": llm.name, "revision": llm.revision, "dtype": llm.dtype}
    said = {**known, "precision": llm.precision}
    return {name: value for name, value in said.items() if UNSAID.get(name) != value}


def entry(run: Run) -> Row:
    """What a journal keeps of a run."""
    row: Row = {
        "method": run.method,
        "parameters": run.parameters,
        "answer": run.answer,
        "tokens": len(run.token_ids),
        "finish_reason": run.finish_reason,
        "kv_bytes": run.kv_bytes,
        "kv_bytes_full": run.kv_bytes_full,
        "kept_fraction": round(run.kept_fraction, 6),
    }
    if run.agreement is not None:
        row["agreement"] = {
            "token_match": round(run.agreement.token_match, 6),
            "rouge_l": round(run.agreement.rouge_l, 6),
        }
    return row


def stopper(stop: Stop) -> Callable[[int], None]:
    """For a prefill's `on_layer`: raises Stopped as soon as `stop` says so."""

    def on_layer(_: int) -> None:
        if stop():
            raise Stopped

    return on_layer


def key(value: Any) -> str:
    """A name for any JSON value, the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _method_key(run: Row) -> str:
    # A sweep's unit changes the capacity that a method was asked for with.
    return key([run["method"], run.get("asked", run["parameters"])])
