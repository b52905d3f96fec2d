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
    """A panel's payload; what is not given is left out."""
    empty: Payload = {"said": [], "figure": None, "tables": [], "csv": None}
    return {"title": title, "source": source, "palette": PALETTE, **empty, **parts}


def needle_panel(summary: Sequence[dict[str, Any]], source: str) -> Payload:
    """Heatmaps; means with Wilson's intervals; the paper's figures beside."""
    return panel(
        "Needle in a haystack",
        source,
        said=tables.standing(summary, "exact"),
        figure=lab_needle.render(summary).to_json(),
        tables=[
            _table(
                "The paper's figures and these, per cent found", tables.needle_paper_lines(summary)
            ),
            _table("Mean over all cells, with Wilson's interval", tables.needle_lines(summary)),
        ],
        csv={"name": "dynamickv_needle.csv", "text": csv_of(needle_rows(summary))},
    )


def needle_rows(summary: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Every cell of the heatmaps, under a row of names."""
    rows: list[list[Any]] = [["method", "capacity", "prompt_tokens", "depth", "exact"]]
    for line in summary:
        for cell in line["cells"]:
            place = [line["method"], line["capacity"], cell["length"], cell["depth"]]
            rows.append([*place, cell["exact"]])
    return rows


def csv_of(rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated values; nothing for None."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def longbench_panel(summary: Sequence[dict[str, Any]], source: str) -> Payload:
    """Scores per task and capacity; the paper's rows beside."""
    blocks = [
        _table(
            "whole cache" if size is None else f"Capacity {size}, scores in per cent",
            tables.longbench_lines(rows),
        )
        for size, rows in tables.blocks_by_capacity(summary)
    ]
    return panel(
        "LongBench",
        source,
        said=[*low_scores(summary), *tables.standing(summary, "average")],
        figure=lab_longbench.render(summary).to_json(),
        tables=[
            _table(
                "The paper's averages over 16 tasks, and these in its layout",
                tables.longbench_paper_lines(summary),
            ),
            *blocks,
        ],
        csv={"name": "dynamickv_longbench.csv", "text": tables.longbench_csv(summary)},
    )


def low_scores(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where FullKV itself hardly answers, methods can only be told apart by chance: said first."""
    full = [row["average"] for row in summary if row["capacity"] is None]
    if not full or max(full) >= LOW:
        return []
    return [
        f"FullKV itself reaches {100 * max(full):.0f} % with this model: so low, the differences "
        "between methods are mostly chance. Read the figures beside FullKV's, not the paper's."
    ]


def sweep_panel(lines: Sequence[dict[str, Any]], source: str) -> Payload:
    """Curves over the capacity."""
    return panel(
        "Capacity sweep",
        source,
        figure=lab_sweep.render(lines).to_json(),
        tables=[_table("Against FullKV's answer", tables.sweep_lines(lines))],
        csv={"name": "dynamickv_sweep.csv", "text": dkv.evaluate.sweep.sweep_csv(lines)},
    )


def tasks_panel(summary: Sequence[dict[str, Any]], source: str) -> Payload:
    """Budgets per task, the distances, and the tokens that moved."""
    first = summary[0]
    return panel(
        "Budgets follow the task?",
        source,
        said=tables.tasks_sentences(first),
        figure=lab_tasks.render(first).to_json(),
        tables=[
            _table(
                "Of the document tokens kept for one task, those that another task does not keep",
                tables.tasks_lines(first),
            )
        ],
        csv={"name": "dynamickv_tasks.csv", "text": csv_of(tables.tasks_lines(first))},
    )


PANELS: dict[str, tuple[str, Callable[[Any, str], Payload]]] = {
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
            return build(record["summary"], f"Recorded {source_words(record['circumstances'])}")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            log.warning("recorded measurement %s left out: %s", path.name, error)
    return panel(title, NOTHING)


def source_words(circumstances: Mapping[str, str]) -> str:
    """When, on what and with which versions."""
    at = circumstances
    return (
        f"{at['date']}: {at['model']} ({at['dtype']}) on {at['device']}, {at['cores']} cores, "
        f"{version_words(at)}."
    )


def _table(caption: str, lines: list[list[str]]) -> dict[str, Any]:
    return {"caption": caption, "lines": lines}
