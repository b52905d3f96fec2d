"""docs/measured.md's account of recorded measurements, from assets/evidence:
python -m benchmarks.evidence.

They were recorded with these commands; --output leads to a .jsonl file of all answers beside the
summary, and a command that was stopped goes on where it was when it is started again.

accelerate launch --num_processes 2 -m dynamickv needle --lengths 1024,2048,3072,4096
    --depths 5 --samples 10 --capacity 64,128,256 --max-new-tokens 20 --dtype float32
    --output benchmarks/results/lab/needle.json
python -m dynamickv longbench --data benchmarks/data --capacity 64,128,256,512
    --output benchmarks/results/lab/multi_news
python -m dynamickv tasks --documents assets/tasks --capacity 128
    --output assets/evidence/tasks.json
python -m dynamickv sweep --document assets/examples/harbour-report.txt
    --question "What is the radio call sign of the harbour office?" --max-new-tokens 48
    --output assets/evidence/sweep.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dynamickv as dkv
from benchmarks.readme import PAGE, put
from benchmarks.report import markdown

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "assets" / "evidence"
START, END = "<!-- evidence: python -m benchmarks.evidence writes this -->", "<!-- /evidence -->"
tables = dkv.evaluate.tables


def section() -> str:
    """Every recorded measurement that exists."""
    parts = [
        *_part("needle", "Needle in a haystack, per cent found", _needle),
        *_part("longbench", "LongBench, mean scores", _longbench),
        *_part("tasks", "Budgets and tasks", _tasks),
    ]
    return "\n".join([START, "\n\n".join(parts), END]) if parts else f"{START}\n{END}"


def _part(name: str, title: str, build: Any) -> list[str]:
    path = EVIDENCE / f"{name}.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text("utf-8"))
    at = record["circumstances"]
    shared = f"{at['processes']} processes, " if at["processes"] != "1" else ""
    where = (
        f"{title}: {at['model']}, {at['dtype']}, {at['device']}, {at['cores']} cores, {shared}"
        f"{at['date']}, torch {at['torch']}, transformers {at['transformers']}."
    )
    return [where, build(record["summary"])]


def _needle(summary: list[dict[str, Any]]) -> str:
    cells = {(c["length"], c["depth"]) for row in summary for c in row["cells"]}
    lengths = sorted({length for length, _ in cells})
    trials = max(row["trials"] for row in summary)
    said = " ".join(tables.standing(summary, "exact"))
    return (
        f"{markdown(tables.needle_paper_lines(summary))}\n\n"
        f"{trials} trials in {len(cells)} cells, prompts of {', '.join(f'{n:,}' for n in lengths)} "
        f"tokens. Wilson's 95 % intervals in per cent: {_intervals(summary, 0)}. {said}"
    )


def _longbench(summary: list[dict[str, Any]]) -> str:
    tasks = {name: task["examples"] for row in summary for name, task in row["tasks"].items()}
    measured = ", ".join(f"{name} ({number} examples)" for name, number in tasks.items())
    said = " ".join(tables.standing(summary, "average"))
    return (
        f"{markdown(tables.longbench_paper_lines(summary))}\n\n"
        f"Here: {measured}. 95 % intervals by bootstrap over examples: "
        f"{_intervals(summary, 1)}. {said}"
    )


def _intervals(summary: list[dict[str, Any]], digits: int) -> str:
    """FullKV's, SnapKV's and DynamicKV's, in hundredths."""
    return ", ".join(
        f"{row['method']} {row['capacity'] or ''}".strip()
        + " {:.{d}f}-{:.{d}f}".format(*(100 * end for end in row["interval"]), d=digits)
        for row in summary
        if row["method"] in ("FullKV", "SnapKV", "DynamicKV")
    )


def _tasks(summary: list[dict[str, Any]]) -> str:
    return "\n".join(f"- {sentence}" for sentence in tables.tasks_sentences(summary[0]))


def main() -> None:
    """Put it into docs/measured.md."""
    put(PAGE, section(), (START, END))


if __name__ == "__main__":
    main()
