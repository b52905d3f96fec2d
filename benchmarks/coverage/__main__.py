"""python -m benchmarks.coverage [--only NAMES] [--anew] [--kvpress PYTHON] -> docs/models.md"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.coverage.families import APART, POPULAR
from benchmarks.coverage.pool import work

RESULTS = Path("benchmarks/results")
CLASSES = ("exact", "refused", "wrong", "error", "own", "unbuilt", "crash")
"""What can come of an entry, best first."""


def main() -> None:
    """Examine what was not examined yet, print the counts, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--only", help="model types, by commas: print all details, write nothing")
    parser.add_argument("--anew", action="store_true", help="forget earlier answers")
    parser.add_argument("--results", type=Path, default=RESULTS / "coverage.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.only:
        work(_command("worker"), options.only.split(","), _print_details, options.workers)
        return
    known = {} if options.anew else read(options.results)
    if options.anew:
        options.results.unlink(missing_ok=True)
    names = [name for name in entries() if name not in known]

    def record(name: str, answer: dict[str, Any]) -> None:
        answer = settled(name, answer)
        known[name] = answer
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(answer, sort_keys=True) + "\n")
        print(
            f"{len(known):3} {answer['verdict']:8} {name:24} {answer['reason'][:120]}", flush=True
        )

    work(_command("worker"), names, record, options.workers)
    print(summary(known))


def entries() -> list[str]:
    """The decoders of text in transformers' mapping."""
    from benchmarks.coverage.tiny import NAMES

    return [name for name in NAMES if name not in APART]


def settled(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """An answer in which a crash is a verdict like others."""
    if "crash" in answer:
        return {
            "name": name,
            "verdict": "crash",
            "reason": answer["crash"],
            "kinds": [],
            "details": {},
        }
    return answer


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Earlier answers by name; the last one counts."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {answer["name"]: answer for answer in map(json.loads, lines)}


def summary(answers: dict[str, dict[str, Any]]) -> str:
    """Counts, and every entry that is not exact with its reason."""
    counts = Counter(answer["verdict"] for answer in answers.values())
    popular = Counter(answers[name]["verdict"] for name in POPULAR if name in answers)
    lines = [
        f"{len(answers)} decoders: " + ", ".join(f"{counts[c]} {c}" for c in CLASSES if counts[c]),
        f"{len(POPULAR)} well known: "
        + ", ".join(f"{popular[c]} {c}" for c in CLASSES if popular[c]),
    ]
    for verdict in CLASSES:
        named = sorted(name for name, answer in answers.items() if answer["verdict"] == verdict)
        lines += ["", f"{verdict}: {len(named)}"]
        if verdict == "exact":
            lines.append(" ".join(named))
        else:
            lines += [f"  {name}: {answers[name]['reason']}" for name in named]
    return "\n".join(lines)


def _command(module: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.coverage.{module}"]


def _print_details(name: str, answer: dict[str, Any]) -> None:
    print(json.dumps(settled(name, answer), indent=1))
    trace = answer.get("details", {}).get("traceback")
    if trace:
        print(trace)


if __name__ == "__main__":
    main()
