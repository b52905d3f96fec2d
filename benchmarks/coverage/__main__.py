"""Which decoders are served: every entry of transformers' causal-LM mapping in small.

python -m benchmarks.coverage                        what the journal lacks; docs/models.md
python -m benchmarks.coverage --anew                 everything
python -m benchmarks.coverage --only qwen3_next      one architecture's checks in full, no files
python -m benchmarks.coverage --kvpress PYTHON       kvpress's column too, in its environment
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.coverage import page
from benchmarks.coverage.families import APART, WRAPPERS
from benchmarks.coverage.pool import work
from benchmarks.report import RESULTS, machine
from dynamickv.version import engine_version

JOURNAL = Path(__file__).parents[1] / "scratch" / "coverage.jsonl"
RECORD = RESULTS / "coverage.json"
PACKAGES = ("kvpress", "transformers", "torch")


def main() -> None:
    """Examine, print the counts, write the record and the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", help="model types, by commas")
    parser.add_argument("--anew", action="store_true", help="forget the journal")
    parser.add_argument("--kvpress", metavar="PYTHON", help="a Python that has kvpress")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--journal", type=Path, default=JOURNAL)
    options = parser.parse_args()
    if options.only:
        names = options.only.split(",")
        work([sys.executable, *WORKER], names, print_details, options.workers)
        return
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    record["machine"] = machine()
    record["here"] = resumed(options.journal, options.anew, options.workers)
    if options.kvpress:
        record["peer"] = versions(options.kvpress)
        record["kvpress"] = asked(options.kvpress, entries(), options.workers)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
    page.write(record)
    print(page.summary(record["here"]))


WORKER = ("-m", "benchmarks.coverage.worker")
KVPRESS_WORKER = ("-m", "benchmarks.coverage.kvpress_worker")


def entries() -> list[str]:
    """The decoders of text in transformers' mapping."""
    from benchmarks.coverage.tiny import NAMES

    return [name for name in NAMES if name not in APART and name not in WRAPPERS]


def resumed(path: Path, anew: bool, workers: int) -> dict[str, dict[str, Any]]:
    """Answers about all entries, those of an earlier run of the same versions read back."""
    built = {"transformers": version("transformers"), "torch": version("torch"), **engine_version()}
    lines = path.read_text("utf-8").splitlines() if path.exists() and not anew else []
    answers: dict[str, dict[str, Any]] = {}
    if lines and json.loads(lines[0]) == built:
        answers = {answer["name"]: answer for answer in map(json.loads, lines[1:])}
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(built) + "\n", "utf-8")
    missing = [name for name in (*entries(), *WRAPPERS) if name not in answers]

    def keep(name: str, answer: dict[str, Any]) -> None:
        answers[name] = answer = settled(name, answer)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")
        reason = answer["reason"] or answer["note"]
        print(f"{len(answers):3} {answer['verdict']:8} {name:24} {reason[:120]}", flush=True)

    work([sys.executable, *WORKER], missing, keep, workers)
    shown = ("verdict", "kinds", "reason", "note")
    return {name: {key: answers[name][key] for key in shown} for name in sorted(answers)}


def asked(python: str, names: Sequence[str], workers: int) -> dict[str, dict[str, Any]]:
    """kvpress's answers."""
    answers: dict[str, dict[str, Any]] = {}

    def keep(name: str, answer: dict[str, Any]) -> None:
        if "crash" in answer:
            answer = {"verdict": "error", "reason": answer["crash"]}
        answers[name] = {key: value for key, value in answer.items() if key != "name"}
        print(f"kvpress {len(answers):3} {answer['verdict']:8} {name}", flush=True)

    work([python, *KVPRESS_WORKER], names, keep, workers)
    return dict(sorted(answers.items()))


def versions(python: str) -> dict[str, str]:
    """What another Python has installed of `PACKAGES`."""
    code = (
        "import json, importlib.metadata as m;"
        f"print(json.dumps({{name: m.version(name) for name in {PACKAGES!r}}}))"
    )
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    installed: dict[str, str] = json.loads(found.stdout)
    return installed


def settled(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """An answer in which a crash is a verdict like others."""
    if "crash" not in answer:
        return answer
    empty = {"name": name, "kinds": "", "note": "", "details": {}}
    return {**empty, "verdict": "crash", "reason": answer["crash"]}


def print_details(name: str, answer: dict[str, Any]) -> None:
    """All that one examination found."""
    answer = settled(name, answer)
    trace = answer["details"].pop("traceback", "")
    print(json.dumps(answer, indent=1) + ("\n" + trace if trace else ""), flush=True)


if __name__ == "__main__":
    main()
