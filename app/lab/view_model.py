"""Measurements -> what the Lab's panels show: sentences, a chart, tables, a CSV file. No widgets,
no model; recorded measurements are read from assets/evidence.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dynamickv as dkv
from app.examples import ASSETS
from app.record.words import version_words
from app.theme import METHOD_STYLES, method_style
from app.views import lab_longbench, lab_needle, lab_sweep, lab_tasks
from app.wording import percent

log = logging.getLogger(__name__)
tables = dkv.evaluate.tables
Payload = dict[str, Any]

PALETTE = {
    name: [method_style(name).light, method_style(name).dark]
    for name in dict.fromkeys([*METHOD_STYLES, *dkv.METHODS])
}
LOW = 0.2
"""A score of FullKV below which a comparison of methods says little."""
NOTHING = "Nothing measured yet: press Measure."


def panel(title: str, source: str, **parts: Any) -> Payload:
    """A panel's payload; what is not given is left out.

    `cells` says what a click on each point opens, `relative` is the figure in per cent of FullKV's
    score, `caption` titles a saved picture.
    """
    empty: Payload = {
        "said": [],
        "figure": None,
        "relative": None,
        "tables": [],
        "csv": None,
        "kind": "",
        "settings": {},
        "cells": [],
        "caption": title,
    }
    return {"title": title, "source": source, "palette": PALETTE, **empty, **parts}


def caption(
    title: str, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], question: str = ""
) -> str:
    """A picture's title: what was asked of which model, at which capacities, with which methods."""
    sizes = sorted({line["capacity"] for line in lines if line.get("capacity") is not None})
    methods = dict.fromkeys(line["method"] for line in lines)
    named = f"capacity {', '.join(f'{size:,}' for size in sizes)}" if sizes else ""
    parts = (settings.get("model"), named, ", ".join(methods))
    made = " · ".join(str(part) for part in parts if part)
    return f"{title}{f': {question}' if question else ''}\n{made}"


def needle_panel(
    summary: Sequence[dict[str, Any]], source: str, settings: Mapping[str, Any] | None = None
) -> Payload:
    """Heatmaps; means with Wilson's intervals; the paper's figures beside."""
    settings = settings or {}
    return panel(
        "Needle in a haystack",
        source,
        said=[line for line in [tables.headline(summary)] if line],
        figure=lab_needle.render(summary).to_json(),
        relative=lab_needle.render(summary, relative=True).to_json(),
        tables=[
            _table(
                "The paper's figures and these, per cent found", tables.needle_paper_lines(summary)
            ),
            _table("Mean over all cells, with Wilson's interval", tables.needle_lines(summary)),
        ],
        csv={"name": "dynamickv_needle.csv", "text": csv_of(needle_rows(summary))},
        kind="needle",
        settings=settings,
        cells=lab_needle.cells(summary),
        caption=caption("Needle in a haystack", summary, settings, "a code of five digits"),
    )


def needle_rows(summary: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Every cell of the heatmaps, under a row of names."""
    head = ["method", "capacity", "prompt_tokens", "depth", "exact", "exact_of_fullkv"]
    rows: list[list[Any]] = [head]
    first: dict[tuple[str, int | None], lab_needle.Map] = {}
    for shown in lab_needle.maps(summary):
        first.setdefault((shown.method, shown.capacity), shown)
    for shown in first.values():
        for place, cell in shown.cells.items():
            of_full = shown.of_full(place)
            share = None if of_full is None else round(of_full, 6)
            rows.append([shown.method, shown.capacity, *place, cell["exact"], share])
    return rows


def csv_of(rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated values; nothing for None."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def longbench_panel(
    summary: Sequence[dict[str, Any]],
    source: str,
    settings: Mapping[str, Any] | None = None,
    texts: Mapping[str, list[str]] | None = None,
) -> Payload:
    """Scores per task and capacity; the paper's rows beside. `texts`: document and question of the
    examples that points open, by their ids.
    """
    settings = settings or {}
    blocks = [
        _table(
            "whole cache" if size is None else f"Capacity {size}, scores in per cent",
            tables.longbench_lines(rows),
        )
        for size, rows in tables.blocks_by_capacity(summary)
    ]
    tasks = dict.fromkeys(task for line in summary for task in line["tasks"])
    if paper := tables.longbench_paper_lines(summary):
        title = "The paper's averages over 16 tasks, and these in its layout"
        blocks.insert(0, _table(title, paper))
    return panel(
        "LongBench",
        source,
        said=low_scores(summary) or [line for line in [tables.headline(summary)] if line],
        figure=lab_longbench.render(summary).to_json(),
        relative=lab_longbench.render(summary, relative=True).to_json(),
        tables=blocks,
        csv={"name": "dynamickv_longbench.csv", "text": tables.longbench_csv(summary)},
        kind="longbench",
        settings=settings,
        cells=lab_longbench.cells(summary, texts),
        texts=texts or {},
        caption=caption("LongBench", summary, settings, ", ".join(tasks)),
    )


def low_scores(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where FullKV itself hardly answers, methods can only be told apart by chance: said alone."""
    full = [row["average"] for row in summary if row["capacity"] is None]
    if not full or max(full) >= LOW:
        return []
    return [
        f"FullKV itself reaches {100 * max(full):.0f} % with this model, so differences between "
        "methods are mostly noise: read them as per cent of FullKV, not beside the paper's."
    ]


def sweep_panel(
    lines: Sequence[dict[str, Any]],
    source: str,
    settings: Mapping[str, Any] | None = None,
    question: str = "",
) -> Payload:
    """Curves over the capacity."""
    settings = settings or {}
    return panel(
        "Capacity sweep",
        source,
        figure=lab_sweep.render(lines).to_json(),
        tables=[_table("Against FullKV's answer", tables.sweep_lines(lines))],
        csv={"name": "dynamickv_sweep.csv", "text": dkv.evaluate.sweep.sweep_csv(lines)},
        kind="sweep",
        settings=settings,
        cells=lab_sweep.cells(lines),
        caption=caption("Capacity sweep", lines, settings, question),
    )


def tasks_panel(
    summary: Sequence[dict[str, Any]], source: str, settings: Mapping[str, Any] | None = None
) -> Payload:
    """Budgets per task, the distances, and the tokens that moved."""
    first = summary[0]
    settings = {**(settings or {}), "method": first["method"]}
    asked = [{"method": first["method"], "capacity": settings.get("capacity")}]
    return panel(
        "Budgets follow the task?",
        source,
        said=[line for line in [how_far(first)] if line],
        figure=lab_tasks.render(first).to_json(),
        tables=[
            _table("Budget that lies in other layers, with its 95 % interval", distances(first)),
            _table(
                "Of the document tokens kept for one task, those that another task does not keep",
                tables.tasks_lines(first),
            ),
        ],
        csv={"name": "dynamickv_tasks.csv", "text": csv_of(tasks_rows(first))},
        kind="tasks",
        settings=settings,
        cells=lab_tasks.cells(first),
        caption=caption("Budgets follow the task?", asked, settings, ", ".join(first["kinds"])),
    )


MOVED = (
    ("same_document", "same_document_interval", "other task, same document"),
    ("within", "", "same task, other document"),
    ("across", "", "other task, other document"),
    ("separation", "interval", "the last two apart, over tasks that both documents meet"),
)
"""Distance of a summary, its interval, and what is compared."""


def how_far(summary: Mapping[str, Any]) -> str:
    """Whether budgets follow the task, in one sentence; empty where no document meets two tasks."""
    distance, method = summary["distance"], summary["method"]
    if distance["same_document"] is None:
        return ""
    other = distance["within"]
    beside = (
        "" if other is None else f"; another document with the same task moves {percent(other)}"
    )
    return (
        f"Another task on the same document moves {percent(distance['same_document'])} of "
        f"{method}'s budget to other layers{beside}."
    )


def distances(summary: Mapping[str, Any]) -> list[list[str]]:
    """The distances as a table, under a row of names."""
    distance = summary["distance"]
    rows = [[f"{summary['method']}, {distance['documents']} documents", "moved", "95 % interval"]]
    for name, interval, compared in MOVED:
        if distance[name] is not None:
            ends = distance.get(interval)
            said = "" if ends is None else " to ".join(map(percent, ends))
            rows.append([compared, percent(distance[name]), said])
    return rows


def tasks_rows(summary: Mapping[str, Any]) -> list[list[Any]]:
    """The chart's numbers, mean tokens kept per head, under a row of names."""
    budgets = summary["budgets"]
    layers = len(next(iter(budgets.values())))
    return [["layer", *budgets], *([i, *(b[i] for b in budgets.values())] for i in range(layers))]


PANELS: dict[str, tuple[str, Callable[..., Payload]]] = {
    "needle": ("Needle in a haystack", needle_panel),
    "sweep": ("Capacity sweep", sweep_panel),
    "tasks": ("Budgets follow the task?", tasks_panel),
    "longbench": ("LongBench", longbench_panel),
}


def recorded(kind: str, folder: Path = ASSETS / "evidence") -> Payload:
    """The panel of a recorded measurement, or of none."""
    title, build = PANELS[kind]
    path = folder / f"{kind}.json"
    if path.is_file():
        try:
            record = json.loads(path.read_text("utf-8"))
            settings = {"model": record["circumstances"]["model"], **record.get("settings", {})}
            source = f"Recorded {source_words(record['circumstances'])}"
            return build(record["summary"], source, settings)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            log.warning("recorded measurement %s left out: %s", path.name, error)
    return panel(title, NOTHING)


def needle_form(folder: Path = ASSETS / "evidence") -> dict[str, Any]:
    """The form of the recorded picture: capacities and lengths as text, and how many depths, texts
    per cell and needles; a small grid where none is recorded.
    """
    try:
        own = folder / "needle-smollm2.json"  # the page's own model's, where another's is shown
        path = own if own.is_file() else folder / "needle.json"
        record = json.loads(path.read_text("utf-8"))
        summary = record["summary"]
        cells = next(line["cells"] for line in summary if line["capacity"] is None)
        sizes = sorted({line["capacity"] for line in summary} - {None})
        return {
            "capacities": ", ".join(map(str, sizes)),
            "lengths": ", ".join(map(str, sorted({cell["length"] for cell in cells}))),
            "depths": len({cell["depth"] for cell in cells}),
            "samples": cells[0]["samples"],
            "needles": record["settings"]["needles"],
        }
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        one = {"depths": 3, "samples": 1, "needles": 1}
        return {"capacities": "64, 128", "lengths": "512, 1024", **one}


def source_words(circumstances: Mapping[str, str]) -> str:
    """When, on what and with which versions."""
    at = circumstances
    return (
        f"{at['date']}: {at['model']} ({at['dtype']}) on {at['device']}, {at['cores']} cores, "
        f"{version_words(at)}."
    )


def _table(caption: str, lines: list[list[str]]) -> dict[str, Any]:
    return {"caption": caption, "lines": lines}
