"""python -m benchmarks.record_examples [ID ...]

Runs the example documents on the embedded model at each example's capacity, and keeps
what happened as assets/runs/ID.json.gz, and what FullKV's answer read as assets/reads/ID.json.gz:
what the page shows before anyone has pressed Run.
"""

from __future__ import annotations

import argparse
import gzip
import json
from typing import Any

import dynamickv as dkv
from app.examples import reads_file
from app.record.words import document_of
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
    parser.add_argument("--reads", action="store_true", help="of the runs that are there already")
    options = parser.parse_args()
    chosen = options.ids or known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"there is no example {unknown[0]!r}; choose from {', '.join(known)}")
    llm = dkv.load_model(dkv.DEFAULT_MODEL, device="cpu", precision="exact")
    RUNS.mkdir(exist_ok=True)
    reads_file(RUNS / "any").parent.mkdir(exist_ok=True)
    for name in chosen:
        example = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
        path = RUNS / f"{name}.json.gz"
        trace = dkv.Trace.load(path) if options.reads else record(llm, example)
        if not options.reads:
            trace.save(path)
        read = json.dumps(record_reads(llm, trace), separators=(",", ":")).encode()
        reads_file(path).write_bytes(gzip.compress(read, mtime=0))
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


def record_reads(llm: dkv.LoadedModel, trace: dkv.Trace) -> dict[str, Any]:
    """What FullKV's answer in a record read, and what of that every run kept."""
    prefill = dkv.prefill(llm, document_of(trace.prompt), trace.prompt.question)
    layers, length = trace.model.num_layers, trace.prompt.length
    kept = [run.retained.unpack(layers, length) for run in trace.runs]
    return dkv.reads(llm, prefill, trace.run("FullKV").token_ids, kept).to_dict()


if __name__ == "__main__":
    main()
