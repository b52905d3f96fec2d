"""docs/measured.md's account of recorded measurements, from assets/evidence:
python -m benchmarks.evidence.

Of three models on one GPU, assets/evidence/models.json, by python -m benchmarks.evidence_run (what
it takes is said there), and from its file by

python -m benchmarks.evidence --collect evidence.tar.gz

The others were recorded with these commands; --output leads to a .jsonl file of all answers beside
the summary, and a command that was stopped goes on where it was when it is started again.

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

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import dynamickv as dkv
from benchmarks import evidence_tables
from benchmarks.readme import PAGE, put
from benchmarks.report import markdown

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "assets" / "evidence"
START, END = "<!-- evidence: python -m benchmarks.evidence writes this -->", "<!-- /evidence -->"
tables = dkv.evaluate.tables


def section() -> str:
    """Every recorded measurement that exists."""
    parts = [
        *_models(),
        *_part("needle", "Needle in a haystack, per cent found", _needle),
        *_part("needle-smollm2", "The same on the page's own model, in made-up sentences", _needle),
        *_part("longbench", "LongBench, mean scores", _longbench),
        *_part("tasks", "Budgets and tasks", _tasks),
    ]
    return "\n".join([START, "\n\n".join(parts), END]) if parts else f"{START}\n{END}"


def _models() -> list[str]:
    """Three models on one GPU."""
    path = EVIDENCE / "models.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text("utf-8"))
    at = next(iter(record["circumstances"].values()))
    where = (
        f"Three models: {at['dtype']}, {at['device']}, {at['date']}, torch {at['torch']}, "
        f"transformers {at['transformers']}. Again with `python -m benchmarks.evidence_run`. At "
        "one capacity every method is given as many places per KV head; KiB says what a KV head "
        "of a layer then holds, fewest to most over the methods: PyramidKV keeps its window "
        "beyond its budget, DynamicKV at times uses less, and Gemma's sliding layers, which stay "
        "as they are, are counted in. Cells in which FullKV finds less than half are not counted. "
        'The best rival is the papers\' method with the highest mean, the first of equals; "-" was '
        "not measured. In brackets 95 % intervals of paired differences, by bootstrap over "
        "prompts: of few they come out too narrow, and without width where all differ alike."
    )
    return [where, *evidence_tables.section(record)]


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence")
    parser.add_argument("--collect", type=Path, metavar="FILE.tar.gz", help="of evidence_run")
    options = parser.parse_args()
    if options.collect is not None:
        with tempfile.TemporaryDirectory() as folder:
            evidence_tables.write(options.collect, Path(folder), EVIDENCE)
    put(PAGE, section(), (START, END))


if __name__ == "__main__":
    main()
