"""README's tables of measured figures, from benchmarks/results: python -m benchmarks.readme."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

README = Path(__file__).parent.parent / "README.md"
NAMES = (
    "start",
    "engine",
    "what-if",
    "evaluate",
    "kvpress",
    "vllm",
    "soak-tiny",
    "soak-real",
    "spread",
)
START, END = "<!-- measured: python -m benchmarks.readme writes this -->", "<!-- /measured -->"


def table(record: dict[str, Any]) -> str:
    """One result file as a Markdown table."""
    rows = columns_by_length(record["rows"]) or rows_with_targets(record["rows"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def machine_of(record: dict[str, Any]) -> str:
    """Where a result file was measured, and with what."""
    machine = record["machine"]
    gpus = f"{machine['gpus']}, " if "gpus" in machine else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {gpus}{machine['date']}, "
        f"Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}:"
    )


def rows_with_targets(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row per figure."""
    cells = [["what", "measured", "target", "met"], ["---"] * 4]
    for row in rows:
        note = f" ({row['note']})" if row["note"] else ""
        value = f"{figure(row['value'])} {row['unit']}".rstrip()
        cells.append([f"{row['measure']}{note}", value, target(row), met([row])])
    return cells


def columns_by_length(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row per measure and one column per prompt length, for measures that end in one (", 4K");
    nothing if they do not."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        measure, _, length = row["measure"].rpartition(", ")
        if not length.endswith("K"):
            return []
        table.setdefault(measure, {})[length] = row
    lengths = list(dict.fromkeys(length for found in table.values() for length in found))
    cells = [["what", *lengths, "target", "met"], ["---"] * (len(lengths) + 3)]
    for measure, found in table.items():
        wanted = "; ".join(
            f"{target(row)} at {length}" for length, row in found.items() if row["target"]
        )
        values = [
            f"{figure(found[length]['value'])} {found[length]['unit']}" if length in found else ""
            for length in lengths
        ]
        same = {target(row) for row in found.values()}
        wanted = same.pop() if len(same) == 1 else wanted
        cells.append([measure, *values, wanted, met(list(found.values()))])
    return cells


def target(row: dict[str, Any]) -> str:
    """A row's target with its unit, or nothing."""
    return f"{row['target']} {row['unit']}".rstrip() if row["target"] else ""


def met(rows: list[dict[str, Any]]) -> str:
    """Whether all figures that have a target meet it: "yes", "no", or nothing without one."""
    wanted = [(row["value"], row["target"].partition(" at ")[0]) for row in rows if row["target"]]
    if not wanted:
        return ""
    return "yes" if all(reaches(value, text) for value, text in wanted) else "no"


def reaches(value: float, text: str) -> bool:
    """Whether a value meets a target such as "<= 1.6"; one without a sign is to be equalled."""
    sign, _, bound = text.rpartition(" ")
    return {
        "<": value < float(bound),
        "<=": value <= float(bound),
        ">=": value >= float(bound),
        "": value == float(bound),
    }[sign]


def figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def section() -> str:
    """All result files that exist, in order."""
    files = [RESULTS / f"{name}.json" for name in NAMES]
    records = [json.loads(file.read_text("utf-8")) for file in files if file.exists()]
    parts = []
    for machine, measured in groupby(records, machine_of):
        parts += [machine, *map(table, measured)]
    return "\n\n".join([START, *parts, END])


def main() -> None:
    """Put the tables into README."""
    text = README.read_text("utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    README.write_text(before + section() + after, "utf-8")


if __name__ == "__main__":
    main()
