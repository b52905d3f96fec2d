"""README's tables of measured figures, from benchmarks/results: python -m benchmarks.readme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

README = Path(__file__).parent.parent / "README.md"
NAMES = ("start", "engine", "kvpress")
START, END = "<!-- measured: python -m benchmarks.readme writes this -->", "<!-- /measured -->"


def table(record: dict[str, Any]) -> str:
    """One result file as a Markdown table under the machine it was taken on."""
    machine = record["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['date']}, "
        f"Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}:",
        "",
        "| what | measured | target |",
        "|---|---|---|",
    ]
    for row in record["rows"]:
        note = f" ({row['note']})" if row["note"] else ""
        target = f"{row['target']} {row['unit']}" if row["target"] else ""
        lines.append(
            f"| {row['measure']}{note} | {figure(row['value'])} {row['unit']} | {target} |"
        )
    return "\n".join(lines)


def figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def section() -> str:
    """All result files that exist, in order."""
    files = [RESULTS / f"{name}.json" for name in NAMES]
    records = [json.loads(file.read_text("utf-8")) for file in files if file.exists()]
    return "\n\n".join([START, *map(table, records), END])


def main() -> None:
    """Put the tables into README."""
    text = README.read_text("utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    README.write_text(before + section() + after, "utf-8")


if __name__ == "__main__":
    main()
