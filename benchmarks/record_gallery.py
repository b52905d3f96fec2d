"""python -m benchmarks.record_gallery [--weights NAME=FILE] [ID ...]

Records the losses that the page's gallery shows: every entry of assets/gallery/gallery.json,
answered by its model from the full and from compressed caches, into assets/gallery/runs/ID.json.gz,
and what FullKV's answer read into assets/gallery/reads/ID.json.gz. An entry that loses nothing is
refused. A model without a short name needs its file: --weights gemma-3-270m=gemma-3-270m.gguf.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dynamickv as dkv
from app.examples import ASSETS, reads_file
from benchmarks.record_examples import record_reads

GALLERY = ASSETS / "gallery"


def main() -> None:
    """Record the entries named on the command line, or all of them."""
    entries = json.loads((GALLERY / "gallery.json").read_text(encoding="utf-8"))
    known = [entry["id"] for entry in entries]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_gallery")
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"from {', '.join(known)}")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    options = parser.parse_args()
    unknown = [name for name in options.ids if name not in known]
    if unknown:
        parser.error(f"there is no entry {unknown[0]!r}; choose from {', '.join(known)}")
    weights = dict(pair.partition("=")[::2] for pair in options.weights)
    chosen = [entry for entry in entries if entry["id"] in (options.ids or known)]
    for name in dict.fromkeys(entry["weights"] for entry in chosen):
        llm = dkv.load_model(weights.get(name, name), device="cpu", precision="exact")
        for entry in chosen:
            if entry["weights"] == name:
                keep(llm, entry)


def keep(llm: dkv.LoadedModel, entry: dict[str, Any]) -> None:
    """Record one entry.

    Raises:
        ValueError: FullKV's answer lacks a fact, or every method's holds them all.
    """
    trace = record(llm, entry)
    facts = entry["expected"]
    held = {
        run.method: all(dkv.find_expected(run.answer, fact) for fact in facts) for run in trace.runs
    }
    for run in trace.runs:
        print(f"{entry['id']}: {run.method:<13}{held[run.method]!s:<6}{run.answer!r}")
    if not held["FullKV"] or all(held.values()):
        raise ValueError(f"{entry['id']} shows no loss; change its question or its capacity")
    path = GALLERY / "runs" / f"{entry['id']}.json.gz"
    for folder in (path.parent, reads_file(path).parent):
        folder.mkdir(exist_ok=True)
    trace.save(path)
    read = json.dumps(record_reads(llm, trace), separators=(",", ":")).encode()
    reads_file(path).write_bytes(gzip.compress(read, mtime=0))


def record(llm: dkv.LoadedModel, entry: dict[str, Any]) -> dkv.Trace:
    """Answer an entry's question with its methods at its capacity; a file is named without its
    path.
    """
    facts = entry["expected"]
    trace = dkv.compare(
        llm,
        (GALLERY / entry["document"]).read_text(encoding="utf-8"),
        entry["question"],
        methods=dkv.build_methods(entry["methods"], capacity=entry["capacity"]),
        max_new_tokens=entry["max_new_tokens"],
        expected=facts[0] if len(facts) == 1 else "",
    )
    return replace(trace, model=replace(trace.model, name=Path(trace.model.name).name))


if __name__ == "__main__":
    main()
