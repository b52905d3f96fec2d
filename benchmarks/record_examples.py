"""python -m benchmarks.record_examples [ID ...]

Runs the example documents on the embedded model at each example's capacity, and keeps
what happened as assets/runs/ID.json.gz: what the page shows before anyone has pressed Run.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import dynamickv as dkv
from benchmarks.prompts import EXAMPLES

ASSETS = EXAMPLES.parent
RUNS = ASSETS / "runs"
METHODS = ("FullKV", "SnapKV", "DynamicKV")
"""Few enough for one row of cards, and for each to be timed alone."""


def main() -> None:
    """Record the examples named on the command line, or all of them."""
    known = sorted(path.stem for path in EXAMPLES.glob("*.json"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_examples")
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"from {', '.join(known)}")
    chosen = parser.parse_args().ids or known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"there is no example {unknown[0]!r}; choose from {', '.join(known)}")
    llm = dkv.load_model(dkv.DEFAULT_MODEL, device="cpu")
    RUNS.mkdir(exist_ok=True)
    for name in chosen:
        example = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
        trace = record(llm, example)
        path = RUNS / f"{name}.json.gz"
        trace.save(path)
        print(f"{name}: {trace.prompt.length:,} tokens, {path.stat().st_size / 1024:.0f} KiB")
        for run in trace.runs:
            agreed = run.agreement.token_match if run.agreement else 1.0
            print(f"  {run.method:<13}{agreed:>5.0%}  {run.answer!r}")


def record(llm: dkv.LoadedModel, example: dict[str, Any]) -> dkv.Trace:
    """Answer an example with each of `METHODS`; of several facts none is looked for alone."""
    facts = example.get("expected", [])
    return dkv.compare(
        llm,
        (EXAMPLES / example["document"]).read_text(encoding="utf-8"),
        example["question"],
        methods=dkv.build_methods(METHODS, capacity=example["capacity"]),
        max_new_tokens=example["max_new_tokens"],
        scores=True,
        expected=facts[0] if len(facts) == 1 else "",
    )


if __name__ == "__main__":
    main()
